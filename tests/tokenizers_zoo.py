"""Tokenizers of every kind that a decoder may come with, trained here on a few words.

Each is wrapped as `transformers` wraps it. Their vocabularies know every character of `UNITS`, at the
start of a word and inside it, so that nothing in a test is unknown unless the test means it.
"""

from __future__ import annotations

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from goldens import GPT2_FILES

# What subjects are made of: each is whole in itself, so that none changes its neighbours when composed.
UNITS = (
    *("a", "e", "n", "s", "T", "The", "Space", "Needle", "New York", "Brien", "x", "I", "0", "42"),
    *(" ", " ", "  ", "\u00a0", "-", ".", ",", "'", "'s", '"', "“", "(", "/", "_", "¿"),
    *("é", "e\u0301", "ü", "Å", "ñ", "o\u0308", "ø", "ß", "İ", "ﬁ", "½", "…", "№"),  # accents, expansions
    *("東", "京", "東京", "カ\u3099", "ガ", "한", "ก", "й", "Ω", "ا"),
    *("🗼", "🏳️", "👍🏽", "👩\u200d🔬", "𠮷"),
)
CORPUS = [
    "The Space Needle is located in the city of Seattle.",
    "The Eiffel Tower (Paris) is not in New York; O'Brien's office is.",
    "l'Hôtel de Ville, São Paulo, Zürich and the Ångström unit",
    "東京タワーは東京にあります。",
    "It  has  two  spaces, and \"quotes\" and 'others'.",
    *(f"{unit} a{unit}a {unit}{unit}" for unit in UNITS),
] * 3


@cache
def gpt2_tokenizer(
    *, trim: bool = False, prefix: bool = False, post_prefix: bool | None = None
) -> PreTrainedTokenizerFast:
    """GPT-2's real vocabulary; optionally with offsets trimmed of spaces, or a space put before the text."""
    files = (str(GPT2_FILES / name) for name in ("vocab.json", "merges.txt"))
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(
        trim_offsets=trim, add_prefix_space=prefix if post_prefix is None else post_prefix
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained here, that trims spaces from its offsets and adds a start token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True, add_prefix_space=False),
            processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@cache
def unigram(*, strip_accents: bool = False) -> PreTrainedTokenizerFast:
    """Unigram as SentencePiece makes it: NFKC, spaces joined, `▁` before every word, `<s>` in front."""
    tokenizer = Tokenizer(models.Unigram())
    if strip_accents:
        steps = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    else:
        steps = [normalizers.NFKC()]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's first: BPE over `▁`-joined text, a `▁` put in front, bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    plain = [text for text in CORPUS if text.isascii()]
    tokenizer.train_from_iterator((word for text in plain for word in text.split()), trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """WordPiece as BERT's: lower case, accents stripped, white space dropped, `[CLS]` and `[SEP]` around."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=200))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
