"""Film reviews whose completions please a classifier."""

from .classifier import SentimentClassifier, review_reward, train_classifier
from .hub import HUB_STAGES, HubSentimentConfig, hub_reward, positive_label, prepare_sentiment
from .pairs import draw_pairs, estimated_optimum, review_metrics, review_pairs, review_prompts
from .prepare import REVIEW_STAGES, prepare_reviews
from .texts import Reviews, SentimentConfig, load_reviews, openings, template_reviews

__all__ = ["HUB_STAGES", "REVIEW_STAGES", "HubSentimentConfig", "Reviews", "SentimentClassifier", "SentimentConfig",
           "draw_pairs", "estimated_optimum", "hub_reward", "load_reviews", "openings", "positive_label",
           "prepare_reviews", "prepare_sentiment", "review_metrics", "review_pairs", "review_prompts", "review_reward",
           "template_reviews", "train_classifier"]
