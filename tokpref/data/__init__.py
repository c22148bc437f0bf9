"""From any preference dataset to padded tensors."""

from .prepare import (LOADERS, shared_prefix, split_pair, check_tokenizer, encode_texts, encode_chat, cut_prompt,
    cut_response, fit_pair, check_weights, text_histogram, PrepReport, prepare, PreferenceCollator, describe_row,
    hh_pair, tldr_pair, chat_pair, qa_pair, to_messages, Loader, find_loader, data_root, load_texts, load_preferences)

__all__ = ["LOADERS", "shared_prefix", "split_pair", "check_tokenizer", "encode_texts", "encode_chat", "cut_prompt",
           "cut_response", "fit_pair", "check_weights", "text_histogram", "PrepReport", "prepare",
           "PreferenceCollator", "describe_row", "hh_pair", "tldr_pair", "chat_pair", "qa_pair", "to_messages",
           "Loader", "find_loader", "data_root", "load_texts", "load_preferences"]
