"""From any preference dataset to padded tensors: formats, tokens, collation, sources, the report, and `prepare`."""

from .collate import PreferenceCollator, pad_rows
from .formats import PARTS, SIDES, check_chat, check_columns, column_kind, row_tools, shared_prefix, split_pair
from .prepare import prepare
from .report import PrepReport, describe_row, text_histogram
from .sources import (
    LOADERS,
    Loader,
    chat_pair,
    code_digest,
    data_root,
    find_loader,
    hh_pair,
    load_preferences,
    load_texts,
    qa_pair,
    tldr_pair,
    to_messages,
)
from .tokens import (
    check_tokenizer,
    check_weights,
    cut_prompt,
    cut_response,
    encode_chat,
    encode_texts,
    fit_pair,
    render_chat,
)

__all__ = ["load_preferences", "load_texts", "LOADERS", "Loader", "data_root", "prepare", "PrepReport", "describe_row",
           "PreferenceCollator", "split_pair", "to_messages", "check_tokenizer", "encode_texts", "encode_chat"]
