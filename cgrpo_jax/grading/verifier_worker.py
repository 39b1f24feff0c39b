"""The process that compares answers. It stands alone: run as a file, imports math-verify and nothing of this project.

One JSON request a line on stdin, {"gold", "answer", "how", "seconds"}; one JSON reply a line on stdout, {"yes",
"status", "seconds", "worn"}: is the answer equal to the gold ("plain": for math-verify alone; "rounded": as its
rounding) or, where it is null, can the gold be read? What an answer does here can only end this process: the kernel's
CPU timer kills it after `seconds` (no Python handler is asked), and its memory is limited. Each answer may use as much
memory as the first one, whatever those before it left: a worker that has grown says that it is worn, and is replaced.
It ends when its stdin does.
"""

import dataclasses
import json
import logging
import os
import re
import resource
import signal
import sys
import time

SPARE = 8  # this part of the memory may be left over from earlier answers


class MemoryWatch(logging.Handler):
    """math-verify swallows what goes wrong and logs it: this notices where it was the memory limit."""

    hit = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] and issubclass(record.exc_info[0], MemoryError):
            self.hit = True


def held_bytes(*names: str) -> list[int]:
    """Of this process: VmSize, VmRSS, or VmHWM, its most ever. (getrusage would tell its parent's before the exec.)"""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return [1024 * int(lines[name].split()[0]) for name in names]


def read(text: str, plain: bool = False) -> list:
    """What math-verify parses, in the form in which it takes a whole text for the answer.

    Unless it is asked for plain, it drops no units: a last letter is one to it, and t^2 + 3t would be t^2 + 3.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    latex = LatexExtractionConfig()
    if not plain:
        latex = dataclasses.replace(
            latex, normalization_config=dataclasses.replace(latex.normalization_config, units=False)
        )
    boxed = text if "\\boxed" in text else f"\\boxed{{{text}}}"
    return parse(boxed, extraction_config=[latex, ExprExtractionConfig()], parsing_timeout=None)


DIGITS = 120  # of values that are compared


def close(gold, answer, places: int) -> bool:
    """Whether two values agree to so many places, in proportion to their size.

    math-verify's own tolerance is absolute: all that is tiny would be equal.
    """
    gold, answer = gold.evalf(DIGITS), answer.evalf(DIGITS)
    scale = max(abs(gold), abs(answer))
    return bool(scale == 0 or abs(gold - answer) <= scale / 10**places)


def somewhere(symbols, step: int) -> dict:
    """A number for each symbol."""
    from sympy import Rational

    return {symbol: Rational(17 + 12 * i, 13 + step * i) for i, symbol in enumerate(sorted(symbols, key=str))}


def nearly_a_multiple(gold, answer) -> bool:
    """Whether two equations are multiples of each other but for something tiny, x = 1/30! and x = 1/31!"""

    def ratio(step: int):
        point = somewhere(gold.free_symbols | answer.free_symbols, step)
        left, right = ((side.lhs - side.rhs).xreplace(point).evalf(DIGITS) for side in (gold, answer))
        return left / right

    first, second = ratio(4), ratio(6)
    return close(first, second, 9) and not close(first, second, DIGITS - 20)


def same_derivatives(gold, answer) -> bool:
    """Whether two things are equal, or equations multiples of each other, where a derivative is a number of its own.

    math-verify finds dy/dx and dx/dy equal: y has no x in it.
    """
    from sympy import Derivative, Symbol
    from sympy.core.relational import Equality

    gold, answer = (
        side.replace(lambda part: isinstance(part, Derivative), lambda part: Symbol(str(part)))
        for side in (gold, answer)
    )
    if not isinstance(gold, Equality) or not isinstance(answer, Equality):
        return bool((gold - answer).expand() == 0)
    ratio, symbols = (gold.lhs - gold.rhs) / (answer.lhs - answer.rhs), gold.free_symbols | answer.free_symbols
    ratios = [ratio.xreplace(somewhere(symbols, step)) for step in (4, 6, 7)]
    return all(close(ratios[0], ratio, DIGITS - 20) for ratio in ratios)


def explicit(value, point: dict):
    """An expression, or the entries of one with matrices, with numbers for its variables."""
    from sympy import MatrixBase, MatrixExpr

    value = value.xreplace(point)
    if isinstance(value, (MatrixBase, MatrixExpr)):
        value = value.doit()
        return list(value.as_explicit() if isinstance(value, MatrixExpr) else value)
    return [value]


def doubtful(gold, answer) -> bool:
    """Whether two things that math-verify holds equal differ in value, or have matrices whose values nobody knows."""
    from sympy import Basic, Derivative, Expr, Float, Integral, Limit, MatrixBase, MatrixExpr, Product, Sum
    from sympy.core.relational import Relational

    matrices = isinstance(gold, MatrixExpr) or isinstance(answer, MatrixExpr)
    unknown = matrices  # what is said where nobody can tell
    try:
        if gold.has(Sum, Product, Integral, Limit):  # no value can be had soon
            return matrices
        if gold.has(Derivative) or answer.has(Derivative):
            unknown = True
            return not same_derivatives(gold, answer)
        decimals = gold.has(Float) or answer.has(Float)
        if isinstance(gold, Relational) and isinstance(answer, Relational):
            return not decimals and nearly_a_multiple(gold, answer)
        kinds = (Expr, MatrixBase, MatrixExpr)
        if not isinstance(gold, kinds) or not isinstance(answer, kinds):
            return False
        point = somewhere(gold.free_symbols | answer.free_symbols, 4)
        places = 5 if decimals else DIGITS - 20  # a decimal is rounded
        pairs = list(zip(explicit(gold, point), explicit(answer, point), strict=True))
        return not all(close(one, other, places) for one, other in pairs if isinstance(one, Basic))
    except MemoryError:
        raise
    except Exception:  # a sum without a value here, say: math-verify has looked at it as a whole
        return unknown


def equal(golds: list, answers: list) -> bool:
    """What math-verify says, where the values do not speak against it."""
    from math_verify import verify

    pairs = ((gold, answer) for gold in golds for answer in answers)
    return any(verify(gold, answer, timeout_seconds=None) and not doubtful(gold, answer) for gold, answer in pairs)


def rounds(exact: list, decimal: str) -> bool:
    """Whether a decimal is the rounding of an exact value to as many places as it has."""
    from sympy import Expr, Rational

    values = [value for value in exact if isinstance(value, Expr) and value.is_number]
    try:
        places = len(decimal.partition(".")[2])
        return any(2 * abs(value.evalf(40) - Rational(decimal)) <= Rational(1, 10**places) for value in values)
    except (TypeError, ValueError):  # no plain decimal, or no real number
        return False


def whole(text: str, parsed: list) -> list:
    """What was parsed, unless it is a number out of a text that has more in it.

    Of a text that it cannot read as a whole math-verify takes a last number or fraction.
    """
    from sympy import Number, Rational

    named = r"\\(?:text|mathrm|begin|end) ?\{[^{}]*\}"
    rest = re.sub(rf"{named}|\\(?!alpha|beta|gamma|delta|theta|lambda|mu|omega)[A-Za-z]+", " ", text)
    written = [abs(Rational(digits)) for digits in re.findall(r"\d+(?:\.\d+)?|\.\d+", rest)]
    variables = re.search(r"[A-Za-df-hj-z]", rest)

    def picked_out(value) -> bool:
        if not isinstance(value, Number):
            return False
        fraction = isinstance(value, Rational) and value.q > 1
        return bool(variables or (len(written) > 2 if fraction else len(written) > 1 and abs(value) in written))

    def cut(value) -> bool:
        return isinstance(value, str) and len(re.findall(r"\w", value)) < len(re.findall(r"\w", text))

    return [value for value in parsed if not picked_out(value) and not cut(value)]


def holds(text: str, gold: list, answer: str, how: str) -> bool:
    """The verdict on one answer; `gold` is what its text was parsed to."""
    from math_verify import verify

    if how == "rounded":
        return rounds(gold, answer)
    parsed = read(answer, how == "plain")
    if how == "plain":
        return bool(verify(gold, parsed, timeout_seconds=None))
    return equal(whole(text, gold), whole(answer, parsed))


def main(memory_bytes: int) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    import math_verify  # noqa: F401  (what it takes belongs to the start)

    watch = MemoryWatch()
    for name in ("math_verify", "latex2sympy2_extended"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(watch)
    size, peak_at_start = held_bytes("VmSize", "VmHWM")
    room, most = memory_bytes - size, memory_bytes + memory_bytes // SPARE
    if room < memory_bytes // SPARE:
        raise SystemExit(
            f"verifier.memory_mb = {memory_bytes >> 20} is too little: it takes {size >> 20} to begin with"
        )
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    golds: dict[tuple[str, bool], list] = {}  # the last gold: the answers to one problem come one after another
    print("ready", file=replies)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # whatever a library prints must not look like a reply
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        request = json.loads(line)
        size, resident = held_bytes("VmSize", "VmRSS")
        resource.setrlimit(resource.RLIMIT_AS, (min(size + room, most), most))
        signal.setitimer(signal.ITIMER_PROF, max(request["seconds"], 0.01))  # SIGPROF's default action ends the process
        began = time.process_time()
        watch.hit = False
        try:
            plain = request["how"] == "plain"
            if (request["gold"], plain) not in golds:
                golds = {(request["gold"], plain): read(request["gold"], plain)}
            gold = golds[request["gold"], plain]
            yes = bool(gold)
            if yes and request["answer"] is not None:
                yes = holds(request["gold"], gold, request["answer"], request["how"])
        except MemoryError:
            watch.hit = True
        except ValueError:  # an integer of more digits than Python reads
            yes = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        (peak,) = held_bytes("VmHWM")
        # Not every MemoryError comes through: an answer that took half of what is allowed counts as one that took all.
        # The peak is that of this answer: a worker whose peak an earlier one has raised by more than a little is gone.
        if watch.hit or 2 * (peak - resident) > memory_bytes:
            watch.hit, golds, yes = True, {}, False
        reply = {"yes": yes, "status": "memory" if watch.hit else "ok", "seconds": time.process_time() - began}
        print(json.dumps(reply | {"worn": SPARE * (peak - peak_at_start) > memory_bytes}), file=replies)


if __name__ == "__main__":
    main(int(sys.argv[1]))
