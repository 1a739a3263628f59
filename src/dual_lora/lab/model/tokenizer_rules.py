"""A limit on what the rules of a tokenizer make of a text: few letters of a tokenizer.json may ask for any number of
tokens."""

import base64
import binascii
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from dual_lora._trial import tried
from dual_lora.lab.errors import UserError

MOST_GROWTH = 1000  # letters out of one by all steps together; NFKC, of which all tables are made, writes 18
MOST_STEPS = 100
MOST_ADDED = 1000  # tokens around each text; published tokenizers have two
LONGEST_MARK = 100  # letters of what stands before or after a part of a word
LONGEST_WORD = 1000  # letters of a word, whose every part WordPiece looks up; published ones have 100
SLOW = 0.2  # seconds of a processor's time for all patterns on a text of some 1000 letters; published ones take 0.001
SECONDS = 20.0  # of that, the start of a process among them

# With one repeat and no group a search ends soon.
_PLAIN = re.compile(r"[^*+?{(]*([*+?]|\{\d{0,2},?\d{0,2}\})?[^*+?{(]*")
# Searched with by the engine that is to search with them, in a process that can be ended.
_TRIAL = r"""
import json, sys, time
path, patterns = json.load(sys.stdin)
sys.path.append(path)
from tokenizers import Regex, pre_tokenizers
text = "The quick brown Fox, 12 years old, isn't far: (it_is) at 3.14 %! " * 6
text += "a" * 99 + "A" * 99 + "1" * 99 + " " * 99
text += "\n" * 30 + "\t\r\n" * 9 + "Äpfel, Straße, çà et là. Привет, мир. 你好,世界。 こんにちは 안녕 مرحبا 🙂🙂 "
text += "\u200d\u0301" + "." * 99 + "-é" * 40
began = time.process_time()
for pattern in patterns:
    try:
        pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
    except BaseException:
        pass
print(time.process_time() - began)
"""
_SEQUENCES = ("normalizers", "pretokenizers", "decoders", "processors")


def check_rules(parts: Mapping[str, Any], where: str) -> None:
    """Raise UserError for rules that make very much out of little. parts: as in tokenizer.json. where: its name.

    What is damaged is left to whoever loads it.
    """
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        steps = list(_steps(parts.get(name)))
        growth = prod(map(_growth, steps))
        if len(steps) > MOST_STEPS or growth > MOST_GROWTH:
            raise UserError(
                f"{where}: the {len(steps)} steps of its {name} may make {growth:.2g} letters of one, expected at "
                f"most {MOST_GROWTH:,} by at most {MOST_STEPS} steps."
            )
        patterns = [p for step in steps if isinstance(p := _mapping(step.get("pattern")).get("Regex"), str)]
        if slow := _slow(tuple(pattern for pattern in patterns if not _PLAIN.fullmatch(pattern))):
            raise UserError(f"{where}: a search for the patterns of its {name} might never end: {slow[:200]!r}.")
    added = [_added(step) for step in _steps(parts.get("post_processor"))]
    if len(added) > MOST_STEPS or sum(added) > MOST_ADDED:
        raise UserError(
            f"{where}: its post_processor puts more than {MOST_ADDED:,} tokens around a text, or writes it twice."
        )
    for name, value in _mapping(parts.get("model")).items():
        if isinstance(value, str) and len(value) > LONGEST_MARK:
            raise UserError(f"{where}: {name} has {len(value):,} letters, expected at most {LONGEST_MARK}.")
        if name == "max_input_chars_per_word" and isinstance(value, int) and value > LONGEST_WORD:
            raise UserError(f"{where}: {name} is {value:,}, expected at most {LONGEST_WORD:,}.")


@lru_cache
def _slow(patterns: tuple[str, ...]) -> str:
    """The patterns, if they take too long; "" if they do not."""
    engine = find_spec("tokenizers")
    if not patterns or engine is None or engine.origin is None:
        return ""
    try:
        done = tried(_TRIAL, [str(Path(engine.origin).parents[1]), patterns], SECONDS)
        late = float(done.stdout or 0) > SLOW
    except subprocess.TimeoutExpired:
        late = True
    return " and ".join(patterns) if late else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of a tokenizer.json, those of a sequence one by one."""
    waiting = [part]
    while waiting:
        step = _mapping(waiting.pop())
        inside = [each for name in _SEQUENCES if isinstance(each := step.get(name), list)]
        waiting += [each for some in inside for each in some]
        if step and not inside:
            yield step


def _growth(step: Mapping[str, Any]) -> float:
    """Letters that a step makes of one, at most, where it can be used again on what it has made."""
    if "precompiled_charsmap" in step:
        return _longest_replacement(step["precompiled_charsmap"])
    if step.get("type") in ("ByteLevel", "Metaspace", "Prepend", None):
        return 2 + len(str(step.get("prepend", "")))
    if "content" not in step or "pattern" not in step:
        return 1
    content, pattern = str(step["content"]), _mapping(step["pattern"]).get("String")
    return max(1.0, len(content) / len(pattern)) if isinstance(pattern, str) and pattern else 1.0 + len(content)


def _longest_replacement(table: Any) -> int:
    """Letters of the longest text in a table of SentencePiece: a trie with its size before it, then texts."""
    try:
        raw = base64.b64decode(table) if isinstance(table, str) else bytes(table)
    except (TypeError, ValueError, binascii.Error):
        return 1
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(len(text.decode("utf-8", "ignore")) for text in texts.split(b"\0")) or 1


def _added(step: Mapping[str, Any]) -> int:
    """Tokens that a step puts around a text; very many for a template in which a text stands twice."""
    known = {name: len(each.get("ids") or ()) for name, each in _mapping(step.get("special_tokens")).items()}
    most = 0
    for form in ("single", "pair"):
        texts, count = [], 0
        for piece in step.get(form) or ():
            if text := _mapping(_mapping(piece).get("Sequence")).get("id"):
                texts.append(text)
            count += known.get(str(_mapping(_mapping(piece).get("SpecialToken")).get("id")), 0)
        most = max(most, MOST_ADDED + 1 if len(texts) > len(set(texts)) else count)
    return most
