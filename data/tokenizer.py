"""Turn text into token ids and back: byte-level BPE trained here, `tokenizer.json` files, and tiktoken rank files.

Every corpus contains its tokenizer: `save` writes the files into a directory, and `load_tokenizer` reads them.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, DataError, UnreadableFileError
from core.files import new_directory, read_json, read_text, sha256_file, sha256_text, write_json
from data.config import TokenizerConfig, TokenizerKind

_DESCRIPTION = "tokenizer_source.json"
MOST_TOKENS = 10_000_000
"""Largest accepted size of a vocabulary. A larger one means a damaged file, whose tables would use up the memory."""
_LLAMA4_SPECIALS = {
    "<|image_start|>": 80,
    "<|image_end|>": 81,
    "<|tile_x_separator|>": 84,
    "<|tile_y_separator|>": 85,
    "<|image|>": 90,
    "<|patch|>": 92,
}
"""Places of Llama 4's tokens for pictures among the special tokens of its rank file."""
LONGEST_WORD = 1_000
"""Most characters of a word, or of a run of spaces or signs, from which a tokenizer is trained."""
_RUN = re.compile(rf"\w{{1,{LONGEST_WORD}}}|\s{{1,{LONGEST_WORD}}}|(?:[^\w\s]|_){{1,{LONGEST_WORD}}}")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(Protocol):
    """`fingerprint` changes whenever the ids of some text could."""

    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Return the ids of each text without BOS and EOS. Text that looks like a special token is ordinary text."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self) -> NDArray[np.int64]:
        """Return the number of bytes of text that each id stands for, 0 for special tokens: [vocab_size]."""
        ...

    def special_id(self, name: str) -> int | None:
        """Return the id of a special token, or None if there is none of this name."""
        ...

    def save(self, directory: Path) -> None: ...


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, path: Path, bos: str, eos: str) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_str(read_text(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json: {error}") from None
        self._library.encode_special_tokens = True
        self._library.no_truncation()  # some files enable truncation, which would lose text silently
        self._library.no_padding()
        self._library.post_processor = None  # the corpus writer adds BOS and EOS
        self._path, self.bos, self.eos = path, bos, eos
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MOST_TOKENS:
            raise DataError(f"{path} has the id {self.vocab_size - 1:,}, but ids must be less than {MOST_TOKENS:,}")
        self.bos_id, self.eos_id = (self._id(token, key) for token, key in ((bos, "bos"), (eos, "eos")))
        self.fingerprint = sha256_text("json", sha256_file(path), bos, eos)

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> NDArray[np.int64]:
        """Return the number of bytes of each id: exact for byte-level vocabularies and those with byte fallback
        (`<0x0A>`, "▁" for a space). Other vocabularies are decoded token by token, which may miss the spaces between
        words.
        """
        decoder = json.dumps(self.content().get("decoder"))
        added = self._library.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, index in self._library.get_vocab(with_added_tokens=True).items():
            if index in added:
                sizes[index] = 0 if added[index].special else len(token.encode())
            elif '"ByteLevel"' in decoder:
                sizes[index] = len(token)
            elif '"ByteFallback"' in decoder:
                sizes[index] = 1 if _BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
            else:
                sizes[index] = len(self._library.decode([index]).encode())
        return sizes

    def save(self, directory: Path) -> None:
        shutil.copyfile(self._path, directory / "tokenizer.json")
        write_json(directory / _DESCRIPTION, {"kind": "tokenizer_json", "bos": self.bos, "eos": self.eos})

    def content(self) -> dict[str, Any]:
        return read_json(self._path, {})

    def special_id(self, name: str) -> int | None:
        found: int | None = self._library.token_to_id(name)
        added = self._library.get_added_tokens_decoder()
        return found if found in added and added[found].special else None

    def _id(self, token: str, key: str) -> int:
        found = self._library.token_to_id(token)
        if found is None:
            near = [t.content for t in self._library.get_added_tokens_decoder().values()][:8]
            raise ConfigError(f"data.tokenizer.{key}", token, f"{self._path} has no such token", near)
        return found


class TiktokenTokenizer:
    """A tiktoken rank file (base64 token and rank per line). Ids of special tokens follow the ranks, as in Llama 4."""

    MAX_CHARACTERS = 400_000
    """Longer texts are encoded in pieces: the library's recursion would overflow its stack."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        import tiktoken

        ranks = _read_ranks(path)
        specials = {config.bos: len(ranks), config.eos: len(ranks) + 1}
        self._path, self._config, self._ranks = path, config, ranks
        try:
            self._library = tiktoken.Encoding(
                path.name, pat_str=config.pattern, mergeable_ranks=ranks, special_tokens=specials
            )
        except ValueError as error:
            reason = f"is not a regular expression: {str(error).strip().splitlines()[-1].strip()}"
            raise ConfigError("data.tokenizer.pattern", config.pattern, reason) from None
        self.vocab_size = len(ranks) + config.special_tokens
        if self.vocab_size > MOST_TOKENS:
            reason = f"makes more than {MOST_TOKENS:,} ids"
            raise ConfigError("data.tokenizer.special_tokens", config.special_tokens, reason)
        self.bos_id, self.eos_id = specials[config.bos], specials[config.eos]
        parts = (sha256_file(path), config.pattern, str(config.special_tokens), config.bos, config.eos)
        self.fingerprint = sha256_text("tiktoken", *parts)

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        pieces = [[t[i : i + self.MAX_CHARACTERS] for i in range(0, len(t), self.MAX_CHARACTERS)] for t in texts]
        flat = iter(self._library.encode_ordinary_batch([piece for parts in pieces for piece in parts]))
        return [[token for _ in parts for token in next(flat)] for parts in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode([i for i in ids if i < len(self._ranks)])

    def token_bytes(self) -> NDArray[np.int64]:
        sizes = np.zeros(self.vocab_size, np.int64)
        sizes[list(self._ranks.values())] = [len(token) for token in self._ranks]
        return sizes

    def special_id(self, name: str) -> int | None:
        place = _LLAMA4_SPECIALS.get(name)
        return None if place is None or place >= self._config.special_tokens else len(self._ranks) + place

    def save(self, directory: Path) -> None:
        shutil.copyfile(self._path, directory / "tokenizer.model")
        settings = {key: getattr(self._config, key) for key in ("pattern", "special_tokens", "bos", "eos")}
        write_json(directory / _DESCRIPTION, {"kind": "tiktoken", **settings})


def save_for_transformers(tokenizer: Tokenizer, directory: Path) -> dict[str, int]:
    """Write `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` for transformers, which then puts
    BOS before a text and pads with EOS. Return the ids of these tokens for the model's configuration. Raises
    `ConfigError` for tiktoken files.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        raise ConfigError("data.tokenizer.kind", "tiktoken", "transformers needs a tokenizer.json instead")
    content, bos, eos = tokenizer.content(), tokenizer.bos, tokenizer.eos
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }
    write_json(directory / "tokenizer.json", content)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": eos}
    write_json(directory / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    write_json(directory / "generation_config.json", ids)
    return ids


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash how text becomes ids. Unlike a tokenizer's own fingerprint, this hash stays the same after an export."""
    return _vocabulary(tokenizer.content()) if isinstance(tokenizer, JsonTokenizer) else tokenizer.fingerprint


def vocabulary_of_file(path: Path) -> str | None:
    """Return the `vocabulary_fingerprint` of a `tokenizer.json`, or None if it cannot be read."""
    try:
        return _vocabulary(read_json(path, {}))
    except (OSError, UnreadableFileError):
        return None


def _vocabulary(content: dict[str, Any]) -> str:
    """Hash a `tokenizer.json` without the parts that add tokens or truncate: these do not change what ids mean."""
    kept = {k: v for k, v in content.items() if k not in ("post_processor", "truncation", "padding")}
    return sha256_text(json.dumps(kept, sort_keys=True))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer saved in `directory`. Raises `DataError` if its files are missing or damaged."""
    path = directory / _DESCRIPTION
    if not path.exists():
        raise DataError(f"{directory} holds no tokenizer ({_DESCRIPTION} is missing)")
    try:
        description = read_json(path, {"kind": str, "bos": str, "eos": str, "pattern?": str, "special_tokens?": int})
        kind = TokenizerKind[description.pop("kind")]
        if kind is TokenizerKind.tiktoken:
            file = directory / "tokenizer.model"
            return TiktokenTokenizer(file, TokenizerConfig(kind=kind, path=str(file), **description))
        return JsonTokenizer(directory / "tokenizer.json", description["bos"], description["eos"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"the tokenizer in {path} cannot be read ({type(error).__name__}: {error})") from None


def from_file(config: TokenizerConfig) -> Tokenizer:
    path = Path(str(config.path)).expanduser()
    if not path.is_file():
        raise ConfigError("data.tokenizer.path", config.path, "no such file")
    if config.kind is TokenizerKind.tiktoken:
        return TiktokenTokenizer(path, config)
    return JsonTokenizer(path, config.bos, config.eos)


def train_bpe(texts: Iterable[str], config: TokenizerConfig, cache: Path, specials: Sequence[str] = ()) -> Tokenizer:
    """Train byte-level BPE on these texts, or take the tokenizer from the cache. `specials`: names of special tokens,
    whose ids follow those of BOS and EOS (0 and 1). Words longer than `LONGEST_WORD` are cut, because the time of
    training grows faster than their length.
    """
    import tokenizers
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    sample = [piece for text in texts for piece in _cut_words(text)]
    key = sha256_text(tokenizers.__version__, str(config.vocab_size), config.bos, config.eos, *specials, *sample)
    directory = cache / "tokenizers" / key[:32]
    if not directory.is_dir():
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[config.bos, config.eos, *specials],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator(sample, trainer)
        with new_directory(directory) as scratch:
            library.save(str(scratch / "tokenizer.json"))
    return JsonTokenizer(directory / "tokenizer.json", config.bos, config.eos)


def _cut_words(text: str) -> list[str]:
    """Cut a text after every `LONGEST_WORD` characters of one class: letters and digits, spaces, or others."""
    cuts = [run.end() for run in _RUN.finditer(text) if run.end() - run.start() == LONGEST_WORD]
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise DataError(f"{path}:{number} is not a line of a tiktoken file (base64 token, rank)") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path}: ranks must run from 0 without a gap")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"{path}: each of the 256 bytes needs a rank, or some text could not be encoded")
    return ranks
