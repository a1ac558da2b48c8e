"""Units of measurement: tells centimetres from metres, and accepts a unit that the solution leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction as F
from typing import NamedTuple

Dimension = tuple[tuple[str, int], ...]  # exponents of base kinds, sorted; () = a plain number


class Unit(NamedTuple):
    """scale: to the base of the dimension. words: a noun that is no unit of measurement ("apples"); then the dimension is empty."""

    dimension: Dimension
    scale: F
    words: frozenset[str] = frozenset()


_ROWS = """
m meter meters metre metres | length 1
cm centimeter centimeters centimetre centimetres | length 1/100
mm millimeter millimeters millimetre millimetres | length 1/1000
dm decimeter decimeters | length 1/10
km kilometer kilometers kilometre kilometres kms | length 1000
nm nanometer nanometers | length 1/1000000000
in inch inches | length 127/5000
ft foot feet | length 381/1250
yd yds yard yards | length 1143/1250
mi mile miles | length 201168/125
g gm gram grams | mass 1/1000
kg kgs kilogram kilograms | mass 1
mg milligram milligrams | mass 1/1000000
tonne tonnes | mass 1000
lb lbs pound pounds | mass 45359237/100000000
oz ounce ounces | mass 45359237/1600000000
ton tons | ton 1
s sec secs second seconds | time 1
ms millisecond milliseconds | time 1/1000
min mins minute minutes | time 60
h hr hrs hour hours | time 3600
day days | time 86400
week weeks wk wks | time 604800
month months | year 1/12
year years yr yrs | year 1
decade decades | year 10
century centuries | year 100
l L liter liters litre litres | length^3 1/1000
ml mL cc milliliter milliliters millilitre millilitres | length^3 1/1000000
gal gallon gallons | gallon 1
quart quarts | gallon 1/4
pint pints | gallon 1/8
cup cups | gallon 1/16
mph | length,time^-1 1397/3125
kph kmh | length,time^-1 5/18
Hz hertz | time^-1 1
N newton newtons | length,mass,time^-2 1
kN | length,mass,time^-2 1000
J joule joules | length^2,mass,time^-2 1
kJ | length^2,mass,time^-2 1000
W watt watts | length^2,mass,time^-3 1
kW | length^2,mass,time^-3 1000
Pa pascal pascals | length^-1,mass,time^-2 1
kPa | length^-1,mass,time^-2 1000
V volt volts | volt 1
A amp amps ampere amperes | ampere 1
ohm ohms | ohm 1
mol mole moles | mole 1
K kelvin kelvins | kelvin 1
degC celsius | celsius 1
degF fahrenheit | fahrenheit 1
$ dollar dollars usd | dollar 1
cent cents | dollar 1/100
€ euro euros eur | euro 1
£ gbp | sterling 1
¥ yen yuan rmb jpy cny | yen 1
₹ rupee rupees inr | rupee 1
ruble rubles rouble roubles | ruble 1
acre acres | acre 1
ha hectare hectares | length^2 10000
rad rads radian radians | radian 1
"""


def _table() -> dict[str, Unit]:
    table = {}
    for row in _ROWS.strip().splitlines():
        names, _, meaning = row.partition(" | ")
        dimension, scale = meaning.split()
        pairs = [kind.partition("^") for kind in dimension.split(",")]
        unit = Unit(tuple(sorted((name, int(power or 1)) for name, _, power in pairs)), F(scale))
        table.update(dict.fromkeys(names.split(), unit))
    return table


UNITS = _table()
MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SAYS_NOTHING = frozenset(
    "unit units total altogether exactly only of the a an each approximately about different distinct possible in".split()
)
# A noun after a number is taken for its unit, but none of these: they change what is said.
_NOT_NOUNS = frozenset(
    """and or not no nor but if is are was were than less more least most greater over under below above minus plus negative
    positive     half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths tenth tenths hundredth hundredths
    thousandth thousandths millionth millionths squared cubed square factorial mod base where when with without
    either neither both any all some except between to through from for false true wrong yes maybe possibly perhaps because since then
    unless until by up down equals equal correct incorrect error answer solution
    choose remainder remainders halved doubled tripled quadrupled dozens gross hundreds thousands millions billions trillions
    sevenths eighths ninths elevenths twelfths thirteenths fifteenths sixteenths twentieths
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
    twenty thirty forty fifty sixty seventy eighty ninety""".split()
)
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}


def lookup(word: str) -> Unit | None:
    return UNITS.get(word) or (UNITS.get(word.lower()) if len(word) > 2 else None)


def make_unit(pieces: Sequence[str]) -> Unit | None:
    """The unit that pieces such as [cm, ^2], [square, meters], [miles, per, hour] or [apples] name; None when they name none."""
    exponents: dict[str, int] = {}
    scale, words = F(1), []
    ahead, sign, expects = 1, 1, False
    for i, piece in enumerate(pieces):
        after = pieces[i + 1] if i + 1 < len(pieces) else ""
        if piece in ("/", "per"):
            sign, expects = -1, True
        elif piece.lower() in _POWERS:
            ahead = _POWERS[piece.lower()]
        elif i and (piece.startswith("^") or piece.lower() in _POWERS_AFTER or piece == "*"):
            pass  # a power was taken with the unit before it
        elif (unit := lookup(piece)) and (piece != "in" or not after or after[0] in "^/"):
            power = int(after[1:]) if after.startswith("^") else _POWERS_AFTER.get(after.lower(), ahead)
            if abs(power) > 9:
                return None
            scale *= unit.scale ** (sign * power)
            for name, exponent in unit.dimension:
                exponents[name] = exponents.get(name, 0) + sign * power * exponent
            ahead, sign, expects = 1, 1, False
        elif not piece.isalpha() or piece.lower() in _NOT_NOUNS or (after.startswith("^") and piece not in ("unit", "units")):
            return None
        else:
            expects = False
            if piece.lower() not in _SAYS_NOTHING:
                words.append(_stem(piece.lower()))
    if expects or len(words) > 4:
        return None
    dimension = tuple(sorted((name, power) for name, power in exponents.items() if power))
    return Unit(dimension, scale, frozenset() if dimension else frozenset(words))


def comparable(a: Unit, b: Unit) -> bool:
    """Whether quantities in these units may be compared after scaling. `5 units` is 5 of whatever the other says."""
    if a.dimension and b.dimension:
        return a.dimension == b.dimension
    if a.dimension or b.dimension:
        return not (a.words or b.words)
    return not a.words or not b.words or bool(a.words & b.words)


def _stem(word: str) -> str:
    return word[:-3] + "y" if word.endswith("ies") else word[:-1] if word.endswith("s") and len(word) > 3 else word
