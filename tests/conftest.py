"""Nothing in these tests reaches the network, draws on a screen, or uses more than one thread."""
import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1",
                  MPLBACKEND="agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")      # before Triton is loaded

@pytest.fixture(autouse=True)
def same_seed():
    "Every test starts from the same random state."
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    "A tokenizer of 64 tokens: one for each printable character that matters, and pad, end and unknown."
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?'-:0"
    vocab = {"<pad>": 0, "<end>": 1, "<unk>": 2} | {letter: i for i, letter in enumerate(letters[:61], start=3)}
    bare = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


@pytest.fixture
def model():
    "A random GPT-2 of 64 tokens and two narrow layers, in float32 and evaluation mode."
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=64,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    "Each trainer collects garbage some times: what is there before a file's first test is not looked at again."
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
