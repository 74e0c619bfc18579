r"""Sparse polynomials in independent standard variables, with exact expectations.

Every variable is standard normal or a fair sign ($\pm 1$, "rademacher"). A monomial is stored as one integer whose
byte $i$ is the exponent of variable $i$, so that multiplying monomials is adding integers; for a sign the exponent
lives modulo two, because $\xi^2 = 1$. Coefficients are floats or `fractions.Fraction`; with fractions every result is
an exact rational number.

Second moments go through the orthogonal basis of the law: Hermite polynomials for a normal variable, $\{1, \xi\}$ for
a sign. There $E[pq] = \sum_\alpha \alpha!\, p_\alpha q_\alpha$, which is linear in the number of terms.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

Law = Literal["gaussian", "rademacher"]
Coefficient = float | Fraction

_MAX_DEGREE = 255  # one byte per exponent


@dataclass(frozen=True)
class Variables:
    """Independent standard variables and the largest number of monomials that a product may have.

    `laws[i]` is "gaussian" or "rademacher". Raises ValueError for an unknown law or a limit below one.

    >>> z, sign = Variables(("gaussian", "rademacher")).all()
    >>> expectation((z + 2 * sign) * (z + 2 * sign))
    5
    """

    laws: tuple[Law, ...]
    limit: int = 2_000_000

    def __post_init__(self) -> None:
        for law in self.laws:
            if law not in ("gaussian", "rademacher"):
                raise ValueError(f"laws contains {law!r}; each must be 'gaussian' or 'rademacher'")
        if self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")

    @cached_property
    def mask(self) -> int:
        """Bits of a monomial that survive multiplication: all for a normal variable, the parity for a sign."""
        return int.from_bytes(bytes(255 if law == "gaussian" else 1 for law in self.laws), "little")

    def constant(self, value: Coefficient) -> Polynomial:
        """The constant polynomial `value`."""
        return Polynomial(self, {0: value} if value else {}, 0)

    def variable(self, index: int) -> Polynomial:
        """The polynomial that is variable `index`; ValueError if there is no such variable."""
        if not 0 <= index < len(self.laws):
            raise ValueError(f"index is {index}; it must be in 0..{len(self.laws) - 1}")
        return Polynomial(self, {1 << (8 * index): 1}, 1)

    def all(self) -> list[Polynomial]:
        """All variables, in order."""
        return [self.variable(index) for index in range(len(self.laws))]


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A polynomial: coefficient per packed monomial, and an upper bound of its total degree.

    Build one from `Variables.constant` and `Variables.variable` with `+`, `-` and `*`. Every operation raises
    ValueError if the two polynomials have different variables, the degree would pass 255 or the number of monomials
    would pass the limit of the variables.

    >>> z = Variables(("gaussian",)).variable(0)
    >>> (z * z - 1).exponents()
    {(2,): 1, (0,): -1}
    """

    variables: Variables
    terms: Mapping[int, Coefficient]
    degree: int

    def exponents(self) -> dict[tuple[int, ...], Coefficient]:
        """The coefficients by exponent tuple."""
        count = len(self.variables.laws)
        return {tuple(key.to_bytes(count, "little")): value for key, value in self.terms.items()}

    def __add__(self, other: Polynomial | Coefficient) -> Polynomial:
        if not isinstance(other, Polynomial):
            other = self.variables.constant(other)
        _check_same(self, other)
        large, small = (self, other) if len(self.terms) >= len(other.terms) else (other, self)
        terms = dict(large.terms)
        for key, value in small.terms.items():
            total = terms.get(key, 0) + value
            if total:
                terms[key] = total
            else:
                del terms[key]
        _check_limit(len(terms), self.variables.limit)
        return Polynomial(self.variables, terms, max(self.degree, other.degree))

    __radd__ = __add__

    def __neg__(self) -> Polynomial:
        return Polynomial(self.variables, {key: -value for key, value in self.terms.items()}, self.degree)

    def __sub__(self, other: Polynomial | Coefficient) -> Polynomial:
        return self + (-other)

    def __rsub__(self, other: Coefficient) -> Polynomial:
        return -self + other

    def __mul__(self, other: Polynomial | Coefficient) -> Polynomial:
        if not isinstance(other, Polynomial):
            terms = {key: value * other for key, value in self.terms.items()} if other else {}
            return Polynomial(self.variables, terms, self.degree)
        _check_same(self, other)
        degree = self.degree + other.degree
        if degree > _MAX_DEGREE:
            raise ValueError(f"a product has degree {degree}; it must be at most {_MAX_DEGREE}")
        mask, limit = self.variables.mask, self.variables.limit
        product: dict[int, Coefficient] = {}
        for key, value in self.terms.items():
            for other_key, other_value in other.terms.items():
                monomial = (key + other_key) & mask
                product[monomial] = product.get(monomial, 0) + value * other_value
            _check_limit(len(product), limit)
        return Polynomial(self.variables, {key: value for key, value in product.items() if value}, degree)

    __rmul__ = __mul__


def derivative(polynomial: Polynomial, index: int) -> Polynomial:
    """Partial derivative in the normal variable `index`.

    Raises ValueError for a sign: as a function on {-1, 1} a polynomial has no derivative.

    >>> z = Variables(("gaussian",)).variable(0)
    >>> derivative(z * z * z, 0).exponents()
    {(2,): 3}
    """
    laws = polynomial.variables.laws
    if not 0 <= index < len(laws) or laws[index] != "gaussian":
        raise ValueError(f"index is {index}; it must name a gaussian variable among {len(laws)}")
    shift = 8 * index
    terms = {
        key - (1 << shift): value * (key >> shift & 255)
        for key, value in polynomial.terms.items()
        if key >> shift & 255
    }
    return Polynomial(polynomial.variables, terms, max(polynomial.degree - 1, 0))


def even_part(polynomial: Polynomial, indices: Collection[int]) -> Polynomial:
    """Average of the polynomial and its mirror image under the sign change of the variables `indices`.

    >>> x, y = Variables(("gaussian", "gaussian")).all()
    >>> even_part(x * y + x * x + y, [0]).exponents()
    {(2, 0): 1, (0, 1): 1}
    """
    parity = sum(1 << (8 * index) for index in set(indices))
    terms = {key: value for key, value in polynomial.terms.items() if (key & parity).bit_count() % 2 == 0}
    return Polynomial(polynomial.variables, terms, polynomial.degree)


def evaluate(polynomial: Polynomial, point: Sequence[Coefficient]) -> Coefficient:
    """Value of the polynomial at a point (one number per variable; ValueError if the count differs).

    >>> z = Variables(("gaussian",)).variable(0)
    >>> evaluate(z * z + 1, [3])
    10
    """
    if len(point) != len(polynomial.variables.laws):
        raise ValueError(f"point has {len(point)} numbers; it must have {len(polynomial.variables.laws)}")
    total: Coefficient = 0
    for exponents, value in polynomial.exponents().items():
        for base, exponent in zip(point, exponents, strict=True):
            if exponent:
                value = value * base**exponent
        total = total + value
    return total


def expectation(polynomial: Polynomial) -> Coefficient:
    """Exact mean, from E z^n = (n-1)!! for even n.

    >>> z = Variables(("gaussian",)).variable(0)
    >>> expectation(z * z * z * z)
    3
    """
    return _orthogonal(polynomial).get(0, 0)


def inner_product(first: Polynomial, second: Polynomial) -> Coefficient:
    """Exact E[first * second]; ValueError if the variables differ.

    >>> z = Variables(("gaussian",)).variable(0)
    >>> inner_product(z * z, z * z)
    3
    """
    _check_same(first, second)
    return _dot(_orthogonal(first), _orthogonal(second), len(first.variables.laws))


def moments(polynomials: Sequence[Polynomial]) -> tuple[list[Coefficient], list[list[Coefficient]]]:
    """Exact means and covariance matrix of several polynomials; ValueError if their variables differ.

    The mean is the constant coefficient in the orthogonal basis and the covariance sums over the others, so
    nothing is lost by subtracting a product of means.

    >>> z = Variables(("gaussian",)).variable(0)
    >>> moments([z * z, z])
    ([1, 0], [[2, 0], [0, 1]])
    """
    for polynomial in polynomials[1:]:
        _check_same(polynomials[0], polynomial)
    bases = [_orthogonal(polynomial) for polynomial in polynomials]
    mean = [basis.pop(0, 0) for basis in bases]
    count = len(polynomials[0].variables.laws) if polynomials else 0
    size = len(bases)
    covariance: list[list[Coefficient]] = [[0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            covariance[i][j] = covariance[j][i] = _dot(bases[i], bases[j], count)
    return mean, covariance


def _check_same(first: Polynomial, second: Polynomial) -> None:
    if first.variables is not second.variables and first.variables != second.variables:
        raise ValueError("the two polynomials have different variables; they must be built from equal Variables")


def _check_limit(count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"a polynomial has {count} monomials or more; the limit of its variables is {limit}")


def _orthogonal(polynomial: Polynomial) -> dict[int, Coefficient]:
    """Coefficients in the orthogonal basis: z^n = sum_j n! / (2^j j! (n-2j)!) He_{n-2j}."""
    count = len(polynomial.variables.laws)
    out: dict[int, Coefficient] = {}
    for key, value in polynomial.terms.items():
        expanded = [(key, value)]
        for index, exponent in enumerate(key.to_bytes(count, "little")):
            if exponent > 1:
                expanded = [
                    (base - (2 * j << (8 * index)), factor * _hermite_coefficient(exponent, j))
                    for base, factor in expanded
                    for j in range(exponent // 2 + 1)
                ]
        for base, factor in expanded:
            out[base] = out.get(base, 0) + factor
    return out


def _hermite_coefficient(exponent: int, j: int) -> int:
    return math.factorial(exponent) // (2**j * math.factorial(j) * math.factorial(exponent - 2 * j))


def _dot(first: Mapping[int, Coefficient], second: Mapping[int, Coefficient], count: int) -> Coefficient:
    if len(first) > len(second):
        first, second = second, first
    total: Coefficient = 0
    for key, value in first.items():
        other = second.get(key)
        if other is not None:
            total = total + math.prod(map(math.factorial, key.to_bytes(count, "little"))) * value * other
    return total
