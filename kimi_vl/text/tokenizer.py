"""Text to ids and back: tiktoken ranks from ``tiktoken.model``, special tokens at fixed offsets after them.

Knows no chat format. Text is inert by default: a control token typed by a user is encoded as ordinary text.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken

from ..errors import CheckpointError

# Source: tokenization_moonshot.py of the published checkpoints.
_HAN = r"[\p{Han}]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        _HAN,
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

NUM_SPECIAL_TOKENS = 258  # two more than fit the embedding: the last two ids are known but have no row
_SPECIAL_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|im_system|>": 10,
    "<|im_middle|>": 17,
    "<|media_start|>": 18,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    "<|media_pad|>": 21,
    "[UNK]": 254,
    "[PAD]": 255,
}

# The published tokenizer encodes long text in pieces; equal ids need equal cuts.
_MAX_PIECE_CHARS = 400_000
_MAX_RUN_CHARS = 25_000


class Tokenizer:
    """The tokenizer of a Kimi-VL checkpoint.

    ``special`` maps every added token to its id (258 of them, from ``len(ranks)`` on); ``named`` holds those with
    a name of their own rather than ``<|reserved_token_N|>``.
    """

    def __init__(self, ranks: dict[bytes, int], named: dict[str, int] | None = None):
        base = len(ranks)
        self.named = (
            {name: base + offset for name, offset in _SPECIAL_OFFSETS.items()} if named is None else dict(named)
        )
        by_id = {index: name for name, index in self.named.items()}
        self.special = {
            by_id.get(index, f"<|reserved_token_{index}|>"): index for index in range(base, base + NUM_SPECIAL_TOKENS)
        }
        self.num_ranks = base
        self.size = base + NUM_SPECIAL_TOKENS
        self._encoding = tiktoken.Encoding(
            "kimi_vl", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )
        self._named_pattern = re.compile(
            "|".join(re.escape(name) for name in sorted(self.named, key=len, reverse=True))
        )
        self._bytes = [self._encoding.decode_single_token_bytes(index) for index in range(self.size)]
        self.bos_id, self.eos_id, self.im_end_id = (self.special[name] for name in ("[BOS]", "[EOS]", "<|im_end|>"))
        self.pad_id, self.media_pad_id = self.special["[PAD]"], self.special["<|media_pad|>"]

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read ``tiktoken.model`` and the names in ``tokenizer_config.json``; errors name the file."""
        directory = Path(directory)
        ranks = _read_ranks(directory / "tiktoken.model")
        return cls(ranks, _read_names(directory / "tokenizer_config.json", len(ranks)))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a turn: ``[EOS]`` and ``<|im_end|>``."""
        return frozenset((self.eos_id, self.im_end_id))

    def encode(self, text: str, allow_special: bool = False, limit: int | None = None) -> list[int]:
        """Ids of ``text``. ``allow_special`` reads control tokens as such, as the published processor does.

        With a ``limit``, a plain text that has more ids is not read to its end: the caller wants to know only that.
        """
        ids: list[int] = []
        if not allow_special:
            for piece in _pieces(text):
                ids += self._encoding.encode_ordinary(piece)
                if limit is not None and len(ids) > limit:
                    break
            return ids
        start = 0
        # named tokens are cut out before the rule for long text, or a run of placeholders would be cut inside one
        for match in self._named_pattern.finditer(text):
            ids += self._encode_special(text[start : match.start()])
            ids.append(self.named[match.group()])
            start = match.end()
        return ids + self._encode_special(text[start:])

    def _encode_special(self, text: str) -> list[int]:
        return [i for piece in _pieces(text) for i in self._encoding.encode(piece, allowed_special="all")]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids whose bytes joined are ``data``, which need not be UTF-8."""
        try:
            return self.encode(data.decode())
        except UnicodeDecodeError:
            return [self._encoding.encode_single_token(bytes([value])) for value in data]

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one id; special tokens give their name."""
        if not 0 <= index < self.size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.size}")
        return self._bytes[index]

    def is_special(self, index: int) -> bool:
        return index >= self.num_ranks

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD. ``skip_special`` drops named special tokens."""
        hidden = set(self.named.values()) if skip_special else set()
        return b"".join(self.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", errors="replace")


class TextStream:
    """Ids to text, one at a time, holding back what is not yet complete UTF-8.

    The pieces joined equal ``tokenizer.decode(all ids)`` without special tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """The text that ``index`` completes, perhaps empty. Special tokens give none."""
        if self._tokenizer.is_special(index):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(index))

    @property
    def unfinished(self) -> bytes:
        """The beginning of a character that is held back."""
        return self._decoder.getstate()[0]

    def drop_unfinished(self) -> None:
        """Forget the beginning of a character that is held back."""
        self._decoder.reset()

    def finish(self) -> str:
        """What is still held back; an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(f"{path}: line {number} is not 'base64 rank'") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks are not 0 to {len(ranks) - 1}, each once")
    if any(bytes([value]) not in ranks for value in range(256)):
        raise CheckpointError(f"{path}: not every single byte has a rank")
    return ranks


def _read_names(path: Path, base: int) -> dict[str, int] | None:
    """Names of special tokens as the checkpoint gives them; None where it has no such file."""
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["added_tokens_decoder"]
        names = {entry["content"]: int(index) for index, entry in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: has no readable added_tokens_decoder") from None
    for name, offset in _SPECIAL_OFFSETS.items():
        if name not in ("[UNK]", "[PAD]") and names.get(name) != base + offset:
            raise CheckpointError(f"{path}: {name} has id {names.get(name)}; {base + offset} was expected")
    if not {"[UNK]", "[PAD]"} <= names.keys():
        raise CheckpointError(f"{path}: [UNK] or [PAD] is missing")
    if any(not base <= index < base + NUM_SPECIAL_TOKENS for index in names.values()):
        raise CheckpointError(f"{path}: a special token lies outside ids {base} to {base + NUM_SPECIAL_TOKENS - 1}")
    return names


def _pieces(text: str) -> Iterator[str]:
    """Cut ``text`` where the published tokenizer does: every 400,000 characters, and inside runs of over 25,000
    characters that are all space or all not space (``str.isspace``)."""
    for begin in range(0, len(text), _MAX_PIECE_CHARS):
        block = text[begin : begin + _MAX_PIECE_CHARS]
        start = run = 0
        in_space: bool | None = None
        for position, character in enumerate(block):
            space = character.isspace()
            if space != in_space:
                in_space, run = space, 1
            else:
                run += 1
                if run > _MAX_RUN_CHARS:
                    yield block[start:position]
                    start, run = position, 1
        yield block[start:]
