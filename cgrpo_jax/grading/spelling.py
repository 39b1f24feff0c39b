"""Other spellings of mathematics as LaTeX: unicode, Python, LaTeX without braces. Linear in the text; no evaluation."""

from __future__ import annotations

import re
import unicodedata

_GREEK = (
    "α alpha β beta γ gamma δ delta ε epsilon ζ zeta η eta θ theta ι iota κ kappa λ lambda μ mu ν nu ξ xi π pi ρ rho "
    "σ sigma τ tau υ upsilon φ phi χ chi ψ psi ω omega Γ Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi Σ Sigma Φ Phi Ψ Psi "
    "Ω Omega"
)
_SIGNS = {
    "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "⋅": "\\cdot ", "∙": "\\cdot ", "÷": "/", "⁄": "/", "’": "'", "′": "'",
    "…": "\\ldots ", "∧": "\\land ", "∨": "\\lor ", "∩": "\\cap ", "⟨": "(", "⟩": ")", "℃": "°C", "℉": "°F", "∣": "|",
    "∠": "\\angle ", "△": "\\triangle ", "∖": "\\setminus ", "⩽": "\\le ", "⩾": "\\ge ", "“": '"', "”": '"',
    "\u2002": " ", "\u2003": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_CHARACTERS = {ord(sign): text for sign, text in _SIGNS.items()}
_CHARACTERS |= {ord(letter): f"\\{name} " for letter, name in re.findall(r"(\S) (\S+)", _GREEK)}
_CHARACTERS |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) != "，"}

_SQUARE_UNIT = re.compile(r"(?<=[\d ])([kcdm]?m|ft|in|yd|mi)([²³])")
_VULGAR = re.compile(r"(\d?) ?([\u00bc-\u00be\u2150-\u215e])")
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿⁱ⁺⁻]+")
_LOWERED = re.compile(r"[₀-₉]+")
_TEMPERATURE = re.compile(r"(?:°|\^ ?\{? ?\\circ ?\}?) ?(?:\\(?:text|mathrm|rm) ?\{ ?([CF]) ?\}|([CF])(?![A-Za-z]))")
_ROMAN = re.compile(r"\\(?:mathrm|text|operatorname) ?\{ ?([ei]) ?\}(?=.)|(?<=.)\\(?:mathrm|text) ?\{ ?([ei]) ?\}")
_ROW_GAP = re.compile(r"\\\\ ?\[ ?[\d.]{1,9} ?[a-z]{2}\]")
_CUBE_ROOT = re.compile(r"∛ ?(\d+|[A-Za-z]|\([^()]*\))")
_INVERSE = re.compile(r"(?<![A-Za-z\\])a(sin|cos|tan) ?(?=\()")
_ABSOLUTE = re.compile(r"(?<![A-Za-z\\])abs ?\(([^()]*)\)")
_ENDLESS_PERIOD = re.compile(r"(\.\d{0,6}?)(\d{2,6})\2+ ?(?:\.{3}|\\l?dots\b|\\cdots\b)")
_ENDLESS = re.compile(r"(\.\d{0,20}?)(\d)\2{2,20} ?(?:\.{3}|\\l?dots\b|\\cdots\b)")

_TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname) ?\{[^{}]*\}"
_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|pi|theta|alpha|beta|gamma|phi|omega"
_NAMED = re.compile(rf"{_TEXT}|(?<![A-Za-z\\])(?:{_NAMES})(?![A-Za-z])")
_PROSE = re.compile(r"[^\W\d_ ]+(?: +[^\W\d_ ]+)*[ .]*")
_SAME_SPACES = re.compile(r"(?<=[\w)\]}!])(?:\*\*| \*\* )(?=[\w(\\{+-])")  # "x**2", "x ** 2", but no bold word
_STAR = re.compile(r"(?<=[\w)}\]!]) ?\* ?(?=[\w(\\{-])")
_POWER = re.compile(r"\^ ?([-+]?\d{2,}|[-+]\d+|[-+]?\d*\.\d+|-[A-Za-z])(?!\d)")
_CALL = re.compile(r"(?:(?<![A-Za-z\\])|\\)sqrt ?\(|√ ?\(|(?:(?<![A-Za-z\\])|\\)exp ?\(|\^ ?\(")
_OPENED = {"s": "\\sqrt{", "√": "\\sqrt{", "e": "e^{", "^": "^{"}
_ROOT_SIGN = re.compile(r"√ ?(\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+)?")
_BARE_ROOT = re.compile(r"\\sqrt ?(\d|(?<= )[A-Za-z]|\\pi)(?![A-Za-z])")

_TOKEN = r"(?:[0-9A-Za-z]|\\(?:pi|theta|alpha|beta)(?![A-Za-z]))"
_FRAC = r"\\[dtc]?frac"
_TWO_TOKENS = re.compile(rf"{_FRAC} ?({_TOKEN}) ?({_TOKEN})")
_FIRST_TOKEN = re.compile(rf"{_FRAC} ?({_TOKEN}) ?\{{")
_SECOND_TOKEN = re.compile(rf"{_FRAC} ?(\{{[^{{}}]*\}}) ?({_TOKEN})")


def _vulgar(match: re.Match) -> str:
    parts = unicodedata.normalize("NFKC", match[2]).split("⁄")
    return f"{match[1]}\\frac{{{parts[0]}}}{{{parts[1]}}}" if len(parts) == 2 and parts[1] else match[0]


def _script(match: re.Match) -> str:
    """Raised or lowered characters as an exponent or an index."""
    mark = "_" if _LOWERED.fullmatch(match[0]) else "^"
    return f"{mark}{{{unicodedata.normalize('NFKC', match[0]).replace('−', '-')}}}"


def _temperature(match: re.Match) -> str:
    return "\\text{celsius}" if (match[1] or match[2]) == "C" else "\\text{fahrenheit}"


def _from_unicode(text: str) -> str:
    text = _SQUARE_UNIT.sub(lambda match: f" \\text{{{match[1]}}}^{'2' if match[2] == '²' else '3'}", text)
    text = _LOWERED.sub(_script, _RAISED.sub(_script, _VULGAR.sub(_vulgar, text)))
    return text.translate(_CHARACTERS)


def _calls(text: str) -> str:
    """`sqrt(...)`, `exp(...)` and `^(...)` with braces. One pass finds the partner of every bracket."""
    calls = {match.end() - 1: match for match in _CALL.finditer(text)}
    if not calls:
        return text
    pieces = list(text)
    open_: list[int] = []
    for position, character in enumerate(text):
        if character == "(":
            open_.append(position)
        elif character == ")" and open_:
            opening = open_.pop()
            if opening in calls:
                start = calls[opening].start()
                pieces[start : opening + 1] = [_OPENED[calls[opening][0].lstrip("\\")[0]]] + [""] * (opening - start)
                pieces[position] = "}"
    return "".join(pieces)


def _named(match: re.Match) -> str:
    return match[0] if match[0].startswith("\\") else f"\\{match[0]} "


def _from_python(text: str) -> str:
    """`2*pi`, `x**2`, `sqrt(3)`, `exp(3)`, `sin(x)`, `atan(x)`, `abs(x)`; what is bold stays for others to see."""
    text = text.replace("**", " ") if text.lstrip().startswith("**") else _SAME_SPACES.sub("^", text)
    text = _CUBE_ROOT.sub(r"\\sqrt[3]{\1}", _ABSOLUTE.sub(r"|\1|", _INVERSE.sub(r"arc\1", text)))
    text = _calls(text.replace("**", " "))
    if not _PROSE.fullmatch(text) or text.strip() in ("pi", "theta", "alpha"):
        text = _NAMED.sub(_named, text)
    text = _ROOT_SIGN.sub(lambda match: f"\\sqrt{{{match[1]}}}" if match[1] else "\\sqrt ", text)
    text = _STAR.sub(r" \\cdot ", _POWER.sub(r"^{\1}", text))
    return text


def _braced(text: str) -> str:
    r"""`\frac ab`, `\frac12`, `\frac{a}b` and `\sqrt 2` with braces."""
    text = _TWO_TOKENS.sub(r"\\frac{\1}{\2}", text)
    text = _FIRST_TOKEN.sub(r"\\frac{\1}{", text)
    text = _SECOND_TOKEN.sub(r"\\frac\1{\2}", text)
    return _BARE_ROOT.sub(r"\\sqrt{\1}", text)


def as_latex(text: str) -> str:
    """One way of writing for what has several; the text is not read as mathematics yet."""
    text = _ROW_GAP.sub(r"\\\\ ", _from_unicode(text))
    text = _ENDLESS_PERIOD.sub(r"\1\\overline{\2}", _ENDLESS.sub(r"\1\\overline{\2}", text))
    text = _ROMAN.sub(lambda match: f" {match[1] or match[2]} ", _TEMPERATURE.sub(_temperature, text))
    text = _from_python(text)
    text = re.sub(r"<=", r"\\le ", re.sub(r">=", r"\\ge ", re.sub(r"(?<![\d)}\]])!=|(?<= )!=", r"\\ne ", text)))
    return _braced(text)
