"""The share of a text's words that are written in a language's script: DeepSeek-R1's language reward, without a model."""

from __future__ import annotations

from functools import lru_cache

import regex

LATIN = "en fr de es it pt nl pl cs sk sl hr hu ro sv da no fi et lv lt is ga sq tr az uz vi id ms tl sw af eu ca gl cy la eo"
CYRILLIC = "ru uk be bg sr mk kk ky mn tg"
SCRIPTS: dict[str, tuple[str, ...]] = {
    **{language: ("Latin",) for language in LATIN.split()},
    **{language: ("Cyrillic",) for language in CYRILLIC.split()},
    **{"zh": ("Han", "Bopomofo"), "ja": ("Han", "Kana"), "ko": ("Hangul",), "el": ("Greek",), "he": ("Hebrew",)},
    **{"yi": ("Hebrew",), "ar": ("Arabic",), "fa": ("Arabic",), "ur": ("Arabic",), "ps": ("Arabic",)},
    **{"hi": ("Devanagari",), "mr": ("Devanagari",), "ne": ("Devanagari",), "sa": ("Devanagari",), "bn": ("Bengali",)},
    **{"pa": ("Gurmukhi",), "gu": ("Gujarati",), "or": ("Oriya",), "ta": ("Tamil",), "te": ("Telugu",)},
    **{"kn": ("Kannada",), "ml": ("Malayalam",), "si": ("Sinhala",), "th": ("Thai",), "lo": ("Lao",)},
    **{"km": ("Khmer",), "my": ("Myanmar",), "ka": ("Georgian",), "hy": ("Armenian",), "am": ("Ethiopic",)},
}
"""Language (ISO 639-1) to the scripts it is written in. Languages of one script cannot be told apart here."""

WORD_LENGTH = {"Han": 2, "Kana": 3, "Thai": 4, "Lao": 4, "Khmer": 4, "Myanmar": 4}
"""Characters that count as one word in scripts without spaces."""

_CODE = regex.compile(r"^[ \t]*(```+|~~~+).*?(?:^[ \t]*\1|\Z)|`[^`\n]*`", regex.MULTILINE | regex.DOTALL)
_MATHS = (("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"))
_NOT_PROSE = regex.compile(
    r"\$(?=\S)[^$\n]*+(?<=\S)\$(?!\d)"  # maths in a line; "from $5 to $6" is none
    r"|\\[A-Za-z]+|https?://\S+|</?[A-Za-z][\w-]*>"  # LaTeX commands, addresses, tags
)


@lru_cache(maxsize=1)
def _words() -> regex.Pattern:
    """Runs of letters of one script, in a group with its name."""
    groups = [r"(?P<Kana>[\p{Hiragana}\p{Katakana}ー]+)", r"(?P<Latin>\p{Latin}[\p{Latin}\p{M}'’]*)"]
    for script in sorted({script for scripts in SCRIPTS.values() for script in scripts} - {"Kana", "Latin"}):
        groups.append(rf"(?P<{script}>\p{{{script}}}[\p{{{script}}}\p{{M}}'’]*)")
    return regex.compile("|".join([*groups, r"(?P<other>\p{L}[\p{L}\p{M}]*)"]))


def prose(text: str) -> str:
    """A text without code, maths, LaTeX commands, tags and addresses. Linear in its length."""
    text = _CODE.sub(" ", text)
    for opening, closing in _MATHS:
        pieces, end = [], 0
        while (start := text.find(opening, end)) >= 0 and (stop := text.find(closing, start + 2)) >= 0:
            pieces.append(text[end:start])
            end = stop + 2
        text = " ".join([*pieces, text[end:]])
    return _NOT_PROSE.sub(" ", text)


def language_consistency(text: str, language: str = "en") -> float:
    r"""The share of the words of `text` that are written in the script of `language`, in [0, 1]; 1.0 for a text without words.

    Code blocks, code in a line, maths between `$` or `\( \)` or `\[ \]`, LaTeX commands, tags, addresses and digits are not
    words. Han, kana, Thai, Lao, Khmer and Burmese have no spaces: 2, 3 or 4 characters count as a word. Single Latin
    letters are variables, and count only where the language is written in Latin letters. Nothing tells languages of one
    script apart. ValueError names the languages. Source: DeepSeek-R1 (arXiv 2501.12948), section 2.3.2, R_language.
    """
    if language not in SCRIPTS:
        raise ValueError(f"language: found {language!r}; accepted: {', '.join(sorted(SCRIPTS))}")
    wanted = SCRIPTS[language]
    total = right = 0
    for match in _words().finditer(prose(text)):
        script, letters = match.lastgroup, match.end() - match.start()
        if script == "Latin" and letters == 1 and "Latin" not in wanted:
            continue
        words = -(-letters // WORD_LENGTH.get(script, letters))
        total += words
        right += words * (script in wanted)
    return right / total if total else 1.0
