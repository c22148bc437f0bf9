"""Stories with sums: problems that the package writes, and a model that is often wrong."""

from .careless import CARELESS, careless_solution, mixed_solutions
from .checking import Check, check_solution, final_answer
from .pairs import breaks, exact_match, marked_samples, math_metrics, pair_numbers, solution_pairs
from .prepare import STORY_STAGES, prepare_stories
from .problems import WordProblem, draw_problems, word_problem
from .start import MathConfig, fine_tune, math_tokenizer, solve, split_problems

__all__ = ["CARELESS", "STORY_STAGES", "Check", "MathConfig", "WordProblem", "breaks", "careless_solution",
           "check_solution", "draw_problems", "exact_match", "final_answer", "fine_tune", "marked_samples",
           "math_metrics", "math_tokenizer", "mixed_solutions", "pair_numbers", "prepare_stories", "solution_pairs",
           "solve", "split_problems", "word_problem"]
