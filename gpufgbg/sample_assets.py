"""Built-in sample assets: street backgrounds with true depth, and figure foregrounds.

Everything is drawn from scratch as Pillow polygons and ellipses, so the package ships no pictures.
The pixels depend on the arguments alone: no fonts, no trigonometry or exponentials (whose last bit
differs between machines) and no NumPy random stream (which may change between NumPy versions).
Only another Pillow release may shade a few outline pixels differently.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

__all__ = ["draw_figure", "draw_street", "write_sample_assets"]

RGB = tuple[int, int, int]
Point2 = tuple[float, float]
Point3 = tuple[float, float, float]
T = TypeVar("T")

MIN_SIDE, MAX_SIDE = 16, 4096  # accepted picture sides, pixels
NEAR_M, FAR_M = 1.0, 80.0  # depth is clipped to this range; the sky is at FAR_M
EYE_M = 1.55  # camera height above the ground
KERB_M, FACADE_M = 3.3, 6.4  # distance of kerbs and facades from the street axis
STREET_END_M = 96.0


def _check_index(index: int) -> None:
    if index < 0:
        raise IndexError(f"index must be 0 or more, got {index}")


def _check_side(name: str, value: int) -> None:
    if not MIN_SIDE <= value <= MAX_SIDE:
        raise ValueError(f"{name} must be {MIN_SIDE} to {MAX_SIDE} pixels, got {value}")


def _rgb(code: str) -> RGB:
    red, green, blue = bytes.fromhex(code)
    return red, green, blue


def _mix(first: RGB, second: RGB, share: float) -> RGB:
    """Blend two colours; share 0 is the first, 1 the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


BLACK, WHITE, DUSK = _rgb("000000"), _rgb("ffffff"), _rgb("0c0d14")
LAMP, SUNLIT = _rgb("ffd88a"), _rgb("fff2b0")


class _Dice:
    """A 64-bit linear congruential generator, the same on every machine and version."""

    def __init__(self, seed: int) -> None:
        self._state = seed * 0x9E3779B97F4A7C15 + 0x1234567
        for _ in range(3):
            self.uniform(0.0, 1.0)

    def uniform(self, low: float, high: float) -> float:
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return low + (high - low) * ((self._state >> 33) / (1 << 31))

    def chance(self, share: float) -> bool:
        return self.uniform(0.0, 1.0) < share

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self.uniform(0.0, len(choices)))]


# --------------------------------------------------------------------------- backgrounds


@dataclass(frozen=True)
class _Mood:
    """Time of day and palette of one street; colours are RRGGBB, lists split by blanks."""

    sky: str  # zenith, middle, horizon
    light: str  # multiplies every surface colour
    leaf: str
    sun: tuple[float, float, float, str]  # x and y (shares of the picture), radius, colour
    walls: str = "e8d3b5 d98f6c c9b7a3 b5654e eadfca 9fb0ac dcb377"
    accents: str = "b8473f 2f6f73 e0a13a 3c5a86 5d7f4e 7c4a5e"  # doors, shops, awnings, cars
    road: str = "6f727c"
    pavement: str = "c9c2b6"
    trim: str = "f4efe4"
    roof: str = "5b6270"
    glass: str = "7fa3b8"
    haze_m: float = 60.0  # distance at which haze takes half of its share
    lit: float = 0.0  # share of windows with the light on
    clouds: int = 0
    stars: int = 0
    shade: float = 0.3  # strength of the shadows
    tree: str = "round"  # round, tall or fir
    roofs: str = "flat mansard gable"


_MOODS = (
    # morning, noon, sunset, overcast, night
    _Mood(
        "8dbfe4 c8dfec fde2c2",
        "fff3e2",
        "7fa85a",
        (0.5, 0.42, 0.05, "fff3cf"),
        clouds=3,
        walls="f0d9c0 e3a98c cfc4b8 f3e6d2 b9c7c4 e8c79a",
    ),
    _Mood("2f8cd6 74bbe9 d3ecf6", "ffffff", "5f9a4a", (0.68, 0.13, 0.035, "fffbe6"), clouds=5, shade=0.34),
    _Mood(
        "45407c c8667c fdb670",
        "f0b6a0",
        "98763c",
        (0.5, 0.45, 0.075, "ffe9b0"),
        clouds=4,
        walls="e6b08a c97f6b d9a58f a86c70 e9c8a4",
        lit=0.3,
        shade=0.4,
        haze_m=50.0,
    ),
    _Mood(
        "97a6b3 b9c4cb dde2e3",
        "d3d8dc",
        "5d7d5a",
        (0.3, 0.1, 0.0, "ffffff"),
        clouds=6,
        walls="b56a55 a8836d c6b8a6 8f9a9c 9c5b4c d3c7b4",
        road="5d626b",
        pavement="aeb0b0",
        lit=0.12,
        shade=0.1,
        haze_m=42.0,
    ),
    _Mood(
        "0a1030 1a2452 41407c",
        "56619c",
        "4d7a5e",
        (0.6, 0.12, 0.03, "f6f0d2"),
        stars=90,
        glass="3f4f78",
        lit=0.55,
        shade=0.25,
    ),
    # pink dawn, southern summer, autumn, snow, blue hour
    _Mood(
        "7c90cc d6a8c9 ffd6c4",
        "f6d8de",
        "8fa27a",
        (0.5, 0.43, 0.045, "fff0dc"),
        clouds=4,
        walls="f2d5cf dfa9a8 c8b4cc f6e7dc b9b6cf e9c3ab",
        lit=0.12,
        shade=0.25,
        accents="a5506a 4d6a94 d98a6a 6b8f86 8a5a8c",
    ),
    _Mood(
        "1c7cc2 5cb4e1 d9f2f1",
        "fffaee",
        "6f9a55",
        (0.32, 0.14, 0.035, "fffbe6"),
        clouds=1,
        walls="fbf7ee f6ead6 f3f1ea f2d8b8 fdfbf6",
        road="8f8b88",
        pavement="e2d6c0",
        accents="2468a8 2f8fa6 e08a3c 3a77b8 c9505a",
        trim="3f7fb5",
        glass="5f8fae",
        roof="c8734f",
        tree="tall",
        roofs="flat flat mansard",
    ),
    _Mood(
        "9fc0cf e4dcc2 f9d9a0",
        "ffe8c6",
        "d8782c",
        (0.5, 0.42, 0.05, "fff2c6"),
        clouds=3,
        walls="c9785a e0b98c a85e4a d9a877 b98d6b ecd6ad",
        pavement="cbb89c",
        haze_m=48.0,
        accents="7a3b34 39605c c98a2c 4b5340",
    ),
    _Mood(
        "98b4d6 ccdbea f3f0f1",
        "e9f0fb",
        "4c7a6a",
        (0.7, 0.2, 0.0, "ffffff"),
        clouds=4,
        walls="b9604f c98d72 d8c7b4 8d97a8 a8504a e2d7c6",
        road="b3bdcb",
        pavement="f1f5fa",
        accents="a83c3c 2f5f6b c98f3a 3c4f7a",
        roof="eef3f9",
        tree="fir",
        lit=0.2,
        shade=0.22,
        haze_m=45.0,
    ),
    _Mood(
        "12294f 33688f f3a98c",
        "7f93b8",
        "4f8a78",
        (0.5, 0.46, 0.0, "ffc9a0"),
        clouds=3,
        accents="e0506a 2fa0a8 f0b040 4f6ad0 8a4fb0",
        glass="46638c",
        lit=0.55,
        stars=30,
    ),
)


class _Street:
    """Paints faces far to near into a supersampled picture and a depth map.

    World axes in metres: x to the right of the street axis, y up from the ground, z along the
    street away from the camera, which stands at (eye, EYE_M, 0).
    """

    def __init__(self, size: tuple[int, int], mood: _Mood, dice: _Dice) -> None:
        self.width, self.height = size
        self.scale = 3 if self.width * self.height <= 1 << 20 else 2
        self.mood, self.dice = mood, dice
        self.zenith, self.middle, self.low = (_rgb(code) for code in mood.sky.split())
        self.focal = 0.62 * math.sqrt(self.width * self.height)
        self.centre = self.width * dice.uniform(0.45, 0.55)
        self.horizon = self.height * dice.uniform(0.51, 0.55)
        self.eye = dice.uniform(-1.2, 1.2)
        sunward = mood.sun[0] - 0.5 or dice.uniform(-1.0, 1.0)
        self.sun_side = 1 if sunward > 0 else -1
        self.image = Image.new("RGB", (self.width * self.scale, self.height * self.scale))
        self.pen = ImageDraw.Draw(self.image)
        self.lights: list[tuple[float, float, float, float, RGB, float]] = []
        # Depth is infinite for the sky until draw_street caps it, which tells it from far ground.
        self.depth = np.full((self.height, self.width), np.inf)
        self.u = (np.arange(self.width) + 0.5 - self.centre) / self.focal
        self.v = (np.arange(self.height) + 0.5 - self.horizon) / self.focal

    def project(self, point: Point3) -> Point2:
        k = self.focal / point[2]
        return self.centre + k * (point[0] - self.eye), self.horizon + k * (EYE_M - point[1])

    def tone(self, colour: RGB) -> RGB:
        """The colour under the light of this time of day."""
        light = _rgb(self.mood.light)
        red, green, blue = (c * k // 255 for c, k in zip(colour, light, strict=True))
        return red, green, blue

    def flat(self, points: Sequence[Point2], colour: RGB) -> None:
        """Fill a polygon given in picture coordinates, leaving the depth alone."""
        self.pen.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=colour)

    def decal(self, points: Sequence[Point3], colour: RGB, glow: bool = False) -> None:
        """Paint on a surface that is already there; glow keeps the colour as it is."""
        self.flat([self.project(p) for p in points], colour if glow else self.tone(colour))

    def face(self, points: Sequence[Point3], colour: RGB) -> None:
        """Paint a planar polygon, depth included."""
        self.decal(points, colour)
        # A plane n.p = k seen along (u, v, 1) lies at z = k / n.(u, v, 1): 1/z is linear in u, v.
        corners = np.array([(x - self.eye, EYE_M - y, z) for x, y, z in points])
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
        offset = float((normal * corners[0]).sum())
        nearest, farthest = corners[:, 2].min(), corners[:, 2].max()
        edge_on = abs(offset) < 1e-9
        a, b, c = (0.0, 0.0, 1.0 / nearest) if edge_on else (float(n) / offset for n in normal)
        rows, columns, inside = self._inside([self.project(p) for p in points], ellipse=False)
        inverse = a * self.u[None, columns] + b * self.v[rows, None] + c
        inverse = np.clip(inverse, 1.0 / farthest, 1.0 / nearest)
        self.depth[rows, columns][inside] = 1.0 / inverse[inside]

    def ball(self, centre: Point3, radius: float, colour: RGB, squash: float = 1.0, glow: bool = False) -> None:
        """Paint an ellipse facing the camera, at the depth of its centre."""
        (x, y), r = self.project(centre), self.focal * radius / centre[2]
        box = [(x - r, y - r * squash), (x + r, y + r * squash)]
        self.pen.ellipse(
            [(a * self.scale, b * self.scale) for a, b in box], fill=colour if glow else self.tone(colour)
        )
        rows, columns, inside = self._inside(box, ellipse=True)
        self.depth[rows, columns][inside] = centre[2]

    def _inside(self, outline: Sequence[Point2], ellipse: bool) -> tuple[slice, slice, NDArray[np.bool_]]:
        """The window around an outline, and which of its pixels have their centre inside."""
        left, right = min(x for x, _ in outline), max(x for x, _ in outline)
        top, bottom = min(y for _, y in outline), max(y for _, y in outline)
        columns = slice(max(0, int(left)), min(self.width, max(0, int(right) + 1)))
        rows = slice(max(0, int(top)), min(self.height, max(0, int(bottom) + 1)))
        size = max(0, columns.stop - columns.start), max(0, rows.stop - rows.start)
        mask = Image.new("L", size)
        draw = ImageDraw.Draw(mask)
        shifted = [(x - 0.5 - columns.start, y - 0.5 - rows.start) for x, y in outline]
        if ellipse:
            draw.ellipse(shifted, fill=255)
        else:
            draw.polygon(shifted, fill=255)
        return rows, columns, np.asarray(mask).reshape(size[::-1]) > 0

    def shine(self, point: Point3, radius: float, colour: RGB, strength: float) -> None:
        """Add a soft light of the given radius (metres) at a point of the scene."""
        z = point[2]
        strength /= 1.0 + (z / 30.0) ** 2
        self.lights.append((*self.project(point), z, self.focal * radius / z, colour, strength))

    def glow(self) -> NDArray[np.float64]:
        """All soft lights together: (height, width, 3), 0 to 255."""
        depth = self.depth[::4, ::4]  # a quarter of the size is enough for something so soft
        total = np.zeros((*depth.shape, 3))
        for x, y, z, radius, colour, strength in self.lights:
            x, y, radius = x / 4, y / 4, max(radius / 4, 1.0)
            rows = slice(max(0, int(y - radius)), max(0, int(y + radius) + 1))
            columns = slice(max(0, int(x - radius)), max(0, int(x + radius) + 1))
            part = total[rows, columns]
            dy = (np.arange(part.shape[0]) + rows.start + 0.5 - y)[:, None] / radius
            dx = (np.arange(part.shape[1]) + columns.start + 0.5 - x)[None, :] / radius
            fall = np.maximum(1.0 - dx * dx - dy * dy, 0.0) ** 2 * strength
            fall[depth[rows, columns] < z - 1.5] *= 0.2  # something stands in front of the light
            part += (np.array(colour) * (1.0 - part / 255.0)) * fall[:, :, None]
        small = Image.fromarray(np.rint(total).astype(np.uint8)).filter(ImageFilter.BoxBlur(1))
        large = small.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return np.asarray(large, dtype=np.float64)


def _paint_sky(street: _Street) -> None:
    mood, dice, scale = street.mood, street.dice, street.scale
    width, height = street.width, street.height
    # Rows of the gradient: zenith to middle over the first half, middle to low over the rest.
    share = np.clip(np.arange(height * scale) / (street.horizon * scale), 0.0, 1.0) * 2.0
    stops = np.array([street.zenith, street.middle, street.low], dtype=np.float64)
    upper = np.minimum(share.astype(np.int64), 1)
    part = (share - upper)[:, None]
    rows = np.rint(stops[upper] * (1.0 - part) + stops[upper + 1] * part).astype(np.uint8)
    column = Image.fromarray(rows[:, None, :])
    street.image.paste(column.resize(street.image.size, Image.Resampling.NEAREST))

    def pill(x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        street.pen.rounded_rectangle(
            [c * scale for c in (x - rx, y - ry, x + rx, y + ry)], min(rx, ry) * scale, colour
        )

    for _ in range(mood.stars):
        x, y = dice.uniform(0.0, width), dice.uniform(0.0, street.horizon * 0.9)
        r = dice.uniform(0.0006, 0.0018) * width
        pill(x, y, r, r, _mix(street.middle, WHITE, dice.uniform(0.4, 1.0)))
    x, y, radius, code = mood.sun
    x, y = (street.centre if x == 0.5 else x * width), y * height
    for reach, strength in ((11.0, 0.3), (4.0, 0.45)):  # z = 0: the glare covers everything
        street.lights.append((x, y, 0.0, max(radius, 0.03) * reach * width, _rgb(code), strength))
    if radius:
        pill(x, y, radius * width, radius * width, _rgb(code))
    for _ in range(mood.clouds):
        x, y = dice.uniform(0.12, 0.88) * width, dice.uniform(0.04, 0.3) * height
        span = dice.uniform(0.06, 0.13) * width
        behind = _mix(street.zenith, street.middle, min(1.0, 2.5 * y / height))
        colour = _mix(behind, _mix(street.low, WHITE, 0.5), 0.6)
        for dx, dy, half in ((0.25, 0.0, 1.0), (-0.1, -0.17, 0.62), (0.1, -0.33, 0.3)):
            pill(x + dx * span, y + dy * span, half * span, 0.13 * span, colour)


def _paint_skyline(street: _Street) -> None:
    unit, below = math.sqrt(street.width * street.height), street.horizon + 1
    for share, tallest in ((0.22, 0.15), (0.42, 0.08)):
        x, colour = 0.0, _mix(street.low, street.tone(_rgb(street.mood.roof)), share)
        while x < street.width:
            wide = street.dice.uniform(0.012, 0.035) * unit
            top = street.horizon - street.dice.uniform(0.25, 1.0) * tallest * unit
            tip = top - wide if street.dice.chance(0.3) else top  # some have a pointed roof
            street.flat([(x, below), (x, top), (x + wide / 2, tip), (x + wide, top), (x + wide, below)], colour)
            x += wide


_CIRCLE: tuple[Point2, ...] = ((1.0, 0.0), (0.92, 0.38), (0.71, 0.71), (0.38, 0.92))
_CIRCLE += tuple((-y, x) for x, y in _CIRCLE)
_CIRCLE += tuple((-x, -y) for x, y in _CIRCLE)


def _paint_ground(street: _Street) -> None:
    dice, road, pavement = street.dice, _rgb(street.mood.road), _rgb(street.mood.pavement)
    joint, paint = _mix(pavement, BLACK, 0.1), _mix(WHITE, road, 0.12)
    top, bottom = street.horizon + 1e-3, street.height + 1
    street.flat([(0, top), (street.width, top), (street.width, bottom), (0, bottom)], street.tone(pavement))
    rows = street.v > 0
    street.depth[rows] = (EYE_M / street.v[rows])[:, None]

    def patch(x0: float, x1: float, z0: float, z1: float, colour: RGB) -> None:
        street.decal([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], colour)

    for step in range(24):  # joints of the pavement slabs
        patch(-FACADE_M * 2, FACADE_M * 2, 1.5 + 1.6 * step, 1.55 + 1.6 * step, joint)
    for x in (-5.4, -4.5, 4.5, 5.4):
        patch(x - 0.025, x + 0.025, 1.0, 40.0, joint)
    patch(-KERB_M, KERB_M, 1.0, 400.0, road)
    for side in (-1, 1):
        patch(side * KERB_M, side * (KERB_M + 0.28), 1.0, 400.0, _mix(pavement, WHITE, 0.35))
        patch(side * KERB_M, side * (KERB_M - 0.07), 1.0, 400.0, _mix(road, BLACK, 0.3))
    for x in (-2.45, -0.95, 0.95, 2.45):  # tyre tracks
        patch(x - 0.3, x + 0.3, 1.0, 200.0, _mix(road, BLACK, 0.05))
    crossing = dice.uniform(5.2, 8.6)
    for step in range(-3, 4):
        patch(step * 0.92 - 0.24, step * 0.92 + 0.24, crossing, crossing + 2.4, paint)
    patch(-0.07, 0.07, 1.0, crossing - 1.2, paint)
    for step in range(20):  # dashes between the lanes
        patch(-0.07, 0.07, crossing + 4.0 * step + 4.0, crossing + 4.0 * step + 6.0, paint)
    x, z = dice.pick((-1.7, 1.7)), dice.uniform(3.0, 4.4)
    for radius, share in ((0.36, 0.35), (0.31, 0.18), (0.12, 0.35)):  # a manhole cover
        rim = [(x + radius * a, 0.0, z + radius * b) for a, b in _CIRCLE]
        street.decal(rim, _mix(road, BLACK, share))


@dataclass(frozen=True)
class _House:
    side: int  # -1 left, 1 right
    near: float  # z of its two ends, metres
    far: float
    floors: int  # above the ground floor
    roof: str  # flat, mansard or gable

    @property
    def eaves(self) -> float:
        return 3.5 + 3.0 * self.floors


def _plan_houses(street: _Street) -> list[_House]:
    """Rows of houses along both sides, with a cross street here and there; farthest first."""
    houses, dice = [], street.dice
    for side in (-1, 1):
        # The row must begin before it comes into view at the edge of the picture.
        z = min(1.2 * street.focal * (FACADE_M - 1.2) / street.width, 4.5) * dice.uniform(0.7, 1)
        while z < STREET_END_M:
            end, floors = z + dice.pick((6.0, 8.0, 8.0, 10.0)), dice.pick((1, 2, 2, 3))
            houses.append(_House(side, z, end, floors, dice.pick(street.mood.roofs.split())))
            z = end + (3.5 if dice.chance(0.14) else 0.0)
    return sorted(houses, key=lambda house: -house.near)


def _paint_shadows(street: _Street, houses: Sequence[_House], trees: Sequence[Point2]) -> None:
    """Shadows on the ground: of the houses on the sunny side, and under trees at (x, z)."""
    mask = Image.new("L", street.image.size)
    draw, strength = ImageDraw.Draw(mask), round(street.mood.shade * 255)
    outlines = [[(x + a, 0.0, z + b) for a, b in _CIRCLE] for x, z in trees]
    for house in houses:
        if house.side == street.sun_side:
            wall, tip = house.side * FACADE_M, house.side * (FACADE_M - house.eaves * 0.55)
            near = house.near - 1.5 if house.near > 6.0 else 1.0  # the first: up to the camera
            outlines.append(
                [(wall, 0.0, near), (tip, 0.0, near), (tip, 0.0, house.far - 1.5), (wall, 0.0, house.far)]
            )
    for outline in outlines:
        corners = [street.project(p) for p in outline]
        draw.polygon([(x * street.scale, y * street.scale) for x, y in corners], fill=strength)
    street.image.paste(street.tone(_mix(BLACK, street.zenith, 0.2)), mask=mask)


def _paint_house(street: _Street, house: _House) -> None:
    mood, dice, side = street.mood, street.dice, house.side
    near, far, eaves = house.near, house.far, house.eaves
    x, back = side * FACADE_M, side * (FACADE_M + 9.0)
    dim = mood.shade if side == street.sun_side else 0.0
    wall, accent, trim, glass, roof = (
        _mix(_rgb(code), DUSK, dim)
        for code in (dice.pick(mood.walls.split()), dice.pick(mood.accents.split()), mood.trim, mood.glass, mood.roof)
    )
    fine = near < 45.0  # details farther away are smaller than a pixel

    def rect(za: float, zb: float, low: float, high: float, out: float = 0.0) -> list[Point3]:
        at = side * (FACADE_M - out)
        return [(at, low, za), (at, low, zb), (at, high, zb), (at, high, za)]

    def decal(za: float, zb: float, low: float, high: float, colour: RGB) -> None:
        street.decal(rect(za, zb, low, high), colour)

    def pane(za: float, zb: float, low: float, high: float, colour: RGB, lit: bool) -> None:
        """Glass: plain when lit, else with two slanting reflections and a shaded upper edge."""
        street.decal(rect(za, zb, low, high), colour, glow=lit)
        if lit and mood.lit > 0.5:
            street.shine((x, (low + high) / 2, (za + zb) / 2), 1.3 * (zb - za), colour, 0.32)
        if not lit and fine:
            for start, stop in ((0.15, 0.4), (0.5, 0.58)):
                a, b, c, d = (za + (zb - za) * k for k in (start, stop, stop + 0.3, start + 0.3))
                street.decal([(x, low, a), (x, low, b), (x, high, c), (x, high, d)], _mix(colour, WHITE, 0.2))
            decal(za, zb, high - 0.25, high, _mix(colour, BLACK, 0.3))

    # The end wall towards the camera, which a lower neighbour or a cross street leaves in view.
    end_wall = _mix(wall, DUSK, 0.22)
    street.face([(x, 0, near), (back, 0, near), (back, eaves, near), (x, eaves, near)], end_wall)
    for step in range(house.floors * 2 if near > 9.0 else 0):
        a, low = x + side * (2.0 + 3.0 * (step % 2)), 4.4 + 3.0 * (step // 2)
        street.decal(
            [(a, low, near), (a + side, low, near), (a + side, low + 1.4, near), (a, low + 1.4, near)],
            _mix(glass, DUSK, 0.22),
        )
    if house.roof == "mansard":
        ridge, top = x + side * 0.9, eaves + 2.3
        street.face(
            [(x, eaves, near), (back, eaves, near), (back, top, near), (ridge, top, near)], _mix(roof, DUSK, 0.22)
        )
        street.face([(x, eaves, near), (x, eaves, far), (ridge, top, far), (ridge, top, near)], roof)
    street.face(rect(near, far, 0.0, eaves), wall)
    if house.roof == "gable":
        middle, peak = (near + far) / 2, eaves + (far - near) * 0.32
        street.face([(x, eaves, near), (x, eaves, far), (x, peak, middle)], wall)
        for end in (near, far):
            street.face(
                [(x, eaves - 0.1, end), (x, peak - 0.1, middle), (x, peak + 0.3, middle), (x, eaves + 0.3, end)], roof
            )
        decal(middle - 0.4, middle + 0.4, eaves + 0.5, eaves + 1.3, _mix(glass, BLACK, 0.1))

    bays = max(2, round((far - near) / 2.5))
    pitch, shutters = (far - near) / bays, dice.chance(0.4)
    for floor in range(house.floors + (house.roof == "mansard")):
        for bay in range(bays):
            middle, lit = near + pitch * (bay + 0.5), dice.chance(mood.lit)
            za, zb, low, high = middle - 0.55, middle + 0.55, 4.25 + 3.0 * floor, 5.9 + 3.0 * floor
            if floor == house.floors:  # a dormer in the roof
                low, high = eaves + 0.5, eaves + 1.75
                street.face(rect(za - 0.1, zb + 0.1, low - 0.1, high + 0.3), trim)
            elif fine:
                decal(za - 0.13, zb + 0.13, low - 0.05, high + 0.13, trim)
                for a in (za - 0.55, zb + 0.06) if shutters else ():
                    decal(a, a + 0.49, low, high, accent)
            warm = _mix(LAMP, _rgb("ff9d5c"), dice.uniform(0.0, 0.6))
            pane(za, zb, low, high, warm if lit else glass, lit)
            if fine:
                decal(middle - 0.04, middle + 0.04, low, high, trim)
                decal(za, zb, low + 0.95, low + 1.02, trim)
                decal(za - 0.22, zb + 0.22, low - 0.2, low - 0.05, _mix(trim, DUSK, 0.13))

    # Ground floor: a shop with an awning, or a plain front; either with a door at one end.
    shop, door = dice.chance(0.6), dice.pick((0, bays - 1))
    decal(near, far, 0.0, 0.45, _mix(wall, DUSK, 0.3))
    if shop:
        decal(near + 0.3, far - 0.3, 0.0, 3.2, accent)
    half, low = (pitch * 0.42, 0.6) if shop else (0.55, 1.0)
    for bay in range(bays):
        middle, lit = near + pitch * (bay + 0.5), dice.chance(mood.lit * 1.5)
        colour = _mix(LAMP, WHITE, 0.25) if lit else _mix(glass, BLACK, 0.2)
        if bay == door:
            decal(middle - 0.65, middle + 0.65, 0.0, 2.6, trim)
            decal(middle - 0.52, middle + 0.52, 0.0, 2.45, _mix(accent, DUSK, 0.4))
            pane(middle - 0.38, middle + 0.38, 1.7, 2.3, colour, lit)
            continue
        if not shop:
            decal(middle - 0.68, middle + 0.68, low - 0.12, 2.8, trim)
        pane(middle - half, middle + half, low, 2.65, colour, lit)
        if fine:
            decal(middle - 0.04, middle + 0.04, low, 2.65, accent if shop else trim)
            decal(middle - half, middle + half, 2.05, 2.12, accent if shop else trim)
    decal(near, far, 3.3, 3.55, _mix(trim, wall, 0.3))
    if shop and dice.chance(0.75):
        start, out = near + 0.4, side * (FACADE_M - 1.15)
        stripes = 2 * max(3, round((far - near) / 1.2)) + 1
        step_z = (far - near - 0.8) / stripes
        street.face([(x, 3.2, start), (x, 2.35, start), (out, 2.35, start)], _mix(accent, DUSK, 0.35))
        for stripe in range(stripes):
            za, zb = start + stripe * step_z, start + (stripe + 1) * step_z
            colour = trim if stripe % 2 else accent
            street.face([(x, 3.2, za), (x, 3.2, zb), (out, 2.5, zb), (out, 2.5, za)], colour)
            street.face(rect(za, zb, 2.28, 2.5, 1.15), _mix(colour, DUSK, 0.1))
    if house.roof != "gable":  # a cornice
        decal(near, far, eaves - 0.6, eaves - 0.35, _mix(wall, DUSK, 0.25))
        street.face(rect(near, far, eaves - 0.35, eaves, 0.25), trim)


def _upright(street: _Street, z: float, x0: float, x1: float, low: float, high: float, colour: RGB) -> None:
    """Paint a rectangle that faces the camera."""
    street.face([(x0, low, z), (x1, low, z), (x1, high, z), (x0, high, z)], colour)


def _paint_tree(street: _Street, x: float, z: float) -> None:
    dice, kind, toward = street.dice, street.mood.tree, street.sun_side
    leaf = _rgb(street.mood.leaf)
    leaf = _mix(leaf, dice.pick((WHITE, BLACK, _rgb("d8b03a"))), dice.uniform(0.0, 0.14))
    dark, bright = _mix(leaf, _rgb("1f2b4a"), 0.32), _mix(leaf, SUNLIT, 0.2)
    size, bark = dice.uniform(0.9, 1.15), _rgb("6a4f40")
    _upright(street, z, x - 0.12, x + 0.12, 0.0, 2.6 if kind == "round" else 1.2, bark)
    if kind == "fir":
        for low, half, tall in ((0.8, 1.25, 1.7), (1.8, 1.0, 1.5), (2.8, 0.72, 1.3)):
            low, half, tall = low * size, half * size, tall * size
            tip, snow, cap = (x, low + tall, z), half * 0.5, low + tall * 0.5
            street.face([(x - half, low, z), (x + half, low, z), tip], dark)
            street.decal([(x, low, z), (x + half * toward, low, z), tip], leaf)
            street.decal(
                [
                    (x - snow, cap, z),
                    (x - snow * 0.4, cap + 0.1, z),
                    (x, cap - 0.12, z),
                    (x + snow * 0.5, cap + 0.08, z),
                    (x + snow, cap, z),
                    tip,
                ],
                WHITE,
            )
    elif kind == "tall":  # a cypress
        for squash, radius, dx, colour in (
            (4.0, 0.62, 0.0, dark),
            (4.4, 0.48, 0.12, leaf),
            (4.6, 0.26, 0.26, bright),
        ):
            centre = (x + dx * toward, 0.55 + 2.5 * size, z)
            street.ball(centre, radius * size, colour, squash)
    else:
        lumps = ((-0.8, 2.7, 0.8), (0.78, 2.75, 0.85), (0.0, 3.0, 1.15), (0.42, 3.65, 0.8), (-0.35, 3.75, 0.9))
        for shift, shrink, colour in ((0.0, 1.0, dark), (0.5, 0.84, leaf), (1.0, 0.55, bright)):
            for dx, y, radius in lumps:
                if colour == bright and dx > 0.4:
                    continue  # the side away from the sun has no bright leaves
                centre = (x + (shift * 0.35 - dx) * toward * size, (y + shift * 0.25) * size, z)
                street.ball(centre, radius * shrink * size, colour)


def _paint_lamp(street: _Street, x: float, z: float) -> None:
    iron, lit, tip = _rgb("2f3440"), street.mood.lit > 0.25, x - (0.9 if x > 0 else -0.9)
    for x0, x1, low, high in (
        (x - 0.05, x + 0.05, 0.0, 4.7),
        (x - 0.1, x + 0.1, 0.0, 0.7),
        (min(x, tip), max(x, tip), 4.62, 4.7),
        (tip - 0.22, tip + 0.22, 4.5, 4.64),
    ):
        _upright(street, z, x0, x1, low, high, iron)
    street.ball((tip, 4.46, z), 0.16, SUNLIT if lit else _rgb("e8ebee"), 0.7, glow=lit)
    if lit:
        for y, radius, strength in ((4.46, 3.4, 0.5), (4.46, 0.8, 0.8), (0.3, 2.6, 0.25)):
            street.shine((tip, y, z), radius, _rgb("ffcf7d"), strength)


# The side of a parked car (distance from its back, height; metres), and its back (share of the
# width from the side that shows, height), each a list of shapes with their colour's name.
_CAR_SIDE = (
    ("dark", ((0.25, 0.9), (0.6, 1.42), (2.3, 1.44), (3.0, 0.9))),
    ("window", ((0.5, 0.93), (0.75, 1.35), (1.4, 1.36), (1.4, 0.93))),
    ("window", ((1.5, 0.93), (1.5, 1.36), (2.2, 1.36), (2.7, 0.93))),
    ("dark", ((0.0, 0.28), (0.0, 0.9), (3.0, 0.92), (4.0, 0.78), (4.1, 0.28))),
    *(
        (name, tuple((at + r * a, 0.33 + r * b) for a, b in _CIRCLE))
        for at in (0.8, 3.25)
        for name, r in (("tyre", 0.33), ("metal", 0.17))
    ),
)
_CAR_BACK = (
    ("body", 0.0, 1.0, 0.28, 0.9),
    ("bumper", 0.0, 1.0, 0.28, 0.42),
    ("plate", 0.36, 0.64, 0.5, 0.64),
    ("edge", 0.0, 1.0, 0.86, 0.91),
    ("lamp", 0.04, 0.2, 0.62, 0.78),
    ("lamp", 0.8, 0.96, 0.62, 0.78),
)


def _paint_car(street: _Street, side: float, z: float) -> None:
    """A parked car seen from behind: the side towards the road, then the back."""
    body = _rgb(street.dice.pick([*street.mood.accents.split(), "e9e6df", "59616e"]))
    colours = {
        "body": body,
        "dark": _mix(body, _rgb("14182c"), 0.35),
        "edge": _mix(body, WHITE, 0.2),
        "bumper": _mix(body, BLACK, 0.45),
        "window": _mix(_rgb(street.mood.glass), BLACK, 0.45),
        "tyre": _rgb("23252c"),
        "metal": _rgb("aeb4bd"),
        "plate": _rgb("f2efe6"),
        "lamp": _rgb("d8402f"),
    }
    inner, outer = side * 1.45, side * 3.1
    street.decal([(inner, 0, z), (outer, 0, z), (outer, 0, z + 4.1), (inner, 0, z + 4.1)], _rgb("1c1e26"))
    for name, outline in _CAR_SIDE:  # above 0.9 m it leans inwards
        street.face([(inner + side * 0.28 * max(0.0, y - 0.9), y, z + along) for along, y in outline], colours[name])
    for a in (0.06, 0.76):
        x0, x1 = (inner + (outer - inner) * k for k in (a, a + 0.18))
        _upright(street, z, x0, x1, 0.0, 0.4, colours["tyre"])
    for inset, low, high, name in ((0.0, 0.9, 1.42, "body"), (0.12, 0.97, 1.34, "window")):
        quad = []
        for end, sign in ((inner, side), (outer, -side)):
            for y in (low, high):
                lean = sign * (0.28 * (y - 0.9) + inset)
                quad.append((end + lean, y, z + 0.25 + 0.67 * (y - 0.9)))
        street.face([quad[0], quad[2], quad[3], quad[1]], colours[name])
    for name, a, b, low, high in _CAR_BACK:
        x0, x1 = (inner + (outer - inner) * k for k in (a, b))
        _upright(street, z, x0, x1, low, high, colours[name])


def _paint_street(street: _Street) -> None:
    dice = street.dice
    _paint_sky(street)
    _paint_skyline(street)
    _paint_ground(street)
    houses = _plan_houses(street)
    things: list[tuple[float, str, float]] = []  # z, kind, x
    for side in (-1, 1):
        z, bare = dice.uniform(6.5, 11.0), dice.chance(0.2)
        while z < 70.0:
            things += [(z + 5.5, "lamp", side * 3.75)] + [(z, "tree", side * 4.35)] * (not bare)
            z += dice.uniform(10.0, 14.0)
        z = dice.uniform(9.0, 16.0)
        while z < 60.0:
            things.append((z, "car", float(side)))
            z += dice.pick((5.6, 5.6, 12.0, 20.0))
    _paint_shadows(street, houses, [(x, z) for z, kind, x in things if kind == "tree"])
    for house in houses:  # all of them first: what stands in the street is never behind a facade
        _paint_house(street, house)
    painters = {"tree": _paint_tree, "lamp": _paint_lamp, "car": _paint_car}
    for z, kind, x in sorted(things, reverse=True):
        painters[kind](street, x, z)


def draw_street(index: int, size: tuple[int, int] = (448, 448)) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draw a street background together with its true depth map.

    The first ten differ in time of day, season and palette; further ones repeat the palettes
    with other houses, trees and cars. The same arguments always give the same pixels.

    Parameters
    ----------
    index
        Which street, 0 or more.
    size
        Width and height in pixels, 16 to 4096 each.

    Returns
    -------
    picture
        (height, width, 3) uint8, RGB.
    depth
        (height, width) float32, metres along the viewing axis, 1 to 80; the sky is at 80.

    Raises
    ------
    IndexError
        If index is negative.
    ValueError
        If a side is out of range.
    """
    _check_index(index)
    width, height = size
    _check_side("width", width)
    _check_side("height", height)
    street = _Street(size, _MOODS[index % len(_MOODS)], _Dice(index))
    _paint_street(street)
    picture = np.asarray(street.image.reduce(street.scale), dtype=np.float64)
    # Haze thickens with distance; a ratio instead of exp() keeps it exact on every machine.
    share = 0.8 / (1.0 + (street.mood.haze_m / street.depth) ** 2)
    share[np.isinf(street.depth)] = 0.0
    picture += (np.array(street.low) - picture) * share[:, :, None]
    picture += street.glow() * (1.0 - picture / 255.0)
    depth = np.clip(street.depth, NEAR_M, FAR_M).astype(np.float32)
    return np.rint(picture).astype(np.uint8), depth


# --------------------------------------------------------------------------- foregrounds

# A figure is a list of parts, back to front: ``operation colour numbers | points; ...``.
#   limb  radii along a smooth path         blob  smooth outline (a doubled point is a corner)
#   disc  one or two radii, at every point  poly  straight-edged outline
#   ring  radius and thickness              use   another list, scaled and moved to a point
# Figures face right, y points down and a grown-up is about 100 high; ``-`` or ``+`` after a colour
# makes it darker or lighter.
_PARTS = {
    "face": """disc skin 4.6 5.4 | 0 0; limb skin 1.1 0.9 | 3.4 0, 4.9 1.2; disc ink 0.65
        0.85 | 2.6 -0.5; limb skin- 0.35 | 2.6 2.9, 3.9 2.7""",
    "short": """use face 1 | 0 0; blob hair | 4.9 -4.6, 2.2 -7.2, -2.6 -7, -5.6 -3.4, -5.6
        1.2, -4 4.2, -2.4 3.6, -1.6 0.6, -0.6 -1.6, 2.4 -2.6; disc skin- 0.9 1.3 | -1.6 1.0""",
    "bun": """disc hair 2.7 | -5.4 -5.2; use face 1 | 0 0; blob hair | 4.6 -4, 2.2 -6.8,
        -2.6 -6.8, -5.6 -3.2, -5.4 1.4, -3.6 3.4, -2.2 1.6, -0.6 -1.6, 2.4 -2.8""",
    "long": """blob hair | 1 -6.8, -4.4 -5.6, -6.2 0, -7 7, -9.4 13, -5 15.6, -0.6 13.4,
        0.6 6, 0 0; use face 1 | 0 0; blob hair | 4.8 -3.8, 2.4 -6.9, -2.6 -6.9, -5.7 -3.2, -6
        4, -5 9, -2.6 8, -1.8 2.4, -0.4 -1.8, 2.4 -2.8""",
    "shoe": """blob shoe | -2.6 -3, 1.4 -3.2, 3.2 -1.2, 7.4 0.2, 8 2.6, 8 2.6, -2.6 2.6,
        -2.6 2.6; limb ink 0.5 | -2.2 2.6, 7.6 2.6""",
}
_FIGURES = (
    # walking man
    """limb top- 2.9 2.5 2.1 | 51 24, 57 35, 65 42; disc skin 2.2 | 66.2 43.2; limb bottom- 5.2
    4.2 3.1 | 47 52, 45 71, 34 86; use shoe 1 | 34 90; limb bottom 5.6 4.4 3.1 | 49 52, 56 71,
    62 91; use shoe 1 | 62 95; limb skin- 2.6 | 50.4 13, 49.4 20; blob top | 44 19.4, 52 18.4,
    56.6 24, 56 38, 55.4 55, 55.4 55, 42 55, 42 55, 42 38, 41 25; limb shirt 1.2 | 46.8 18.4,
    51.8 18.8; use short 1.16 | 51.6 8.4; limb top+ 3.2 2.7 2.2 | 46.6 24, 40 37, 38 49; disc
    skin 2.3 | 37.8 51.2; limb accent 1 | 44 22, 49 36, 55.4 47; blob accent | 51 45, 51 45, 60
    45.6, 60 45.6, 60 57, 60 57, 50.4 57, 50.4 57; limb accent- 0.7 | 51.4 49.4, 59.6 49.8""",
    # person with an umbrella
    """limb ink 0.75 | 58 -12, 61.6 41; limb bottom- 3.6 2.9 2.5 | 49 68, 46 80, 41 91; use
    shoe 1 | 41 95; limb bottom 3.7 3 2.5 | 52 68, 56 80, 60 91; use shoe 1 | 60 95; limb skin-
    2.4 | 50 13, 49.4 20; blob coat | 45 19, 53 18.4, 57 25, 56 40, 63.4 73, 63.4 73, 51 75.4,
    38.6 73, 38.6 73, 44 40, 42 26; blob coat- | 43.8 40, 43.8 40, 56.2 40, 56.2 40, 56.8 43.4,
    56.8 43.4, 43.2 43.4, 43.2 43.4; limb coat- 0.5 | 54 45, 57 72; use long 1.18 | 51 9.4;
    blob accent | 44 18, 50 19, 55.4 17.4, 56 20.6, 50 23, 44 21.6; limb accent- 1.9 1.5 | 46.4
    21, 43.6 33; limb coat+ 3.4 2.9 2.4 | 47.4 25.4, 51.4 38, 59.4 36.6; disc skin 2.3 | 61 36;
    limb ink 0.75 | 61.4 38, 61.8 43.4, 64 44.6, 65.6 42.6; blob accent | 57 -13.6, 44 -11, 33
    -3, 28.6 7, 28.6 7, 33.6 4.6, 39 7, 39 7, 48 3.6, 57.6 6, 57.6 6, 67 3, 76.4 5, 76.4 5,
    81.6 2.4, 87 4.4, 87 4.4, 81.6 -5, 70 -12; blob accent+ | 57 -13.6, 49 -9, 41.6 0, 39 7, 39
    7, 48 3.6, 57.6 6, 57.6 6, 58 -4; limb ink 0.9 | 56.6 -17, 57.2 -13.4""",
    # cyclist
    """limb bottom- 4.6 3.8 2.8 | 37 50, 53 58, 42 72; use shoe 0.9 | 40 75.4; ring ink 18.4
    2.5 | 16 81, 78 81; disc metal 2 | 16 81, 78 81; limb accent 1.6 | 16 81, 43 82, 36 58;
    limb accent 1.4 | 16 81, 37.6 62; limb accent 1.8 | 43 82, 68 62, 37.6 61; limb accent 1.7
    | 66 55, 69 63, 78 81; limb ink 1.3 | 66.4 57, 65.4 51, 72 49; limb ink 2 1.6 1 | 30.4
    55.4, 37 55.8, 43 57; limb metal 1.3 | 39 74, 43 82, 47 90; disc metal 3.8 | 43 82; limb
    top- 2.8 2.4 2 | 54 27, 62 40, 70 47.6; limb skin- 2.6 | 53.5 23, 57 16; blob top | 50 20,
    56 21.4, 58 28, 50 41, 44 53, 36 55.4, 31 51, 34 40, 41.6 27; limb hair 2.6 2 | 54.6 12,
    55.4 16.4; use face 1.16 | 59.6 12; disc skin- 1 1.4 | 57.6 13; blob accent | 66.4 9.4,
    66.4 9.4, 64.4 3.6, 58 1.6, 52 5, 50.8 11.6, 50.8 11.6, 58 10; limb accent+ 0.8 | 53.4 6.6,
    57.6 4.4, 62.4 5; limb ink 0.5 | 57.4 10, 59.4 17.6; limb bottom 5.2 4.2 2.9 | 37.4 51.4,
    55 66, 46.4 85; use shoe 0.95 | 47 88.2; limb top+ 3.1 2.6 2.1 | 51 28, 58.4 41, 70 49;
    disc skin 2.3 | 71 49""",
    # child with a balloon
    """limb ink 0.45 | 71 24, 69 38, 72 52, 70.6 63; disc accent 13 15.4 | 71 6; poly accent- |
    71 20.8, 69 24, 73 24; disc accent+ 2.4 4 | 66 0; limb skin- 2.4 | 52 69, 60 68, 69 63;
    limb bottom- 4.4 3.6 3 | 49 80, 47 88, 43 93; use shoe 0.9 | 43 97; limb bottom 4.6 3.8 3 |
    51 80, 54 88, 56 93; use shoe 0.9 | 56 97; blob top | 46 63, 54 63, 56.4 68, 57.4 84, 57.4
    84, 43.4 84, 43.4 84, 44 68; limb shirt 1.1 | 44.4 74, 56.6 74; limb shirt 1.1 | 44 79, 57
    79; use bun 1.55 | 51 53; limb top+ 2.8 2.5 | 47 67, 44 72.5; limb skin 2.1 | 43.6 73, 45
    79.6; limb top- 2.8 2.4 | 53.6 66.6, 60 67.6; limb skin 2.1 | 61 67.6, 70.6 63.4; disc skin
    2.5 | 70.8 62.8""",
    # dog
    """limb fur- 4.8 3.4 2.6 | 34 66, 28 80, 31 93; limb fur- 4.4 3.2 2.6 | 74 64, 79 80, 78
    93; limb fur- 2.8 2.2 | 31 96.6, 34 97; limb fur- 2.8 2.2 | 78 96.6, 81.6 97; limb fur 3.8
    4.6 4.2 2.4 | 27 53, 17 42, 20 29, 30 30; limb fur+ 2.2 1.6 | 22 31, 29 31; blob fur | 24
    52, 40 46, 60 46, 74 36, 86 40, 86 58, 78 70, 60 71, 44 66, 34 72, 25 66; blob cream | 86
    50, 86 60, 78 71, 60 72, 48 67, 64 66, 76 60; limb fur 8.2 4.2 2.8 | 33 61, 33 78, 38 92;
    limb fur 6 4 2.8 | 77 62, 72 80, 72 92; limb cream 3 2.4 | 38.6 96.4, 42.4 97; limb cream 3
    2.4 | 72.6 96.4, 76.6 97; limb fur 9.4 8 | 78 47, 85 32; poly fur- | 87 24, 92 9, 96 23;
    disc fur 11.4 10.4 | 87.6 29; blob cream | 88 34, 96 30, 106 32, 108 36, 103 40, 92 41;
    disc ink 2.4 2 | 106.8 32.6; limb ink 0.55 | 106 37.4, 101 37.8, 97.6 36.6; blob fur | 78
    25, 80 8, 80 8, 90 20, 90 20; blob cream- | 81 22, 81.4 13, 81.4 13, 86.6 20; disc ink 1.6
    1.9 | 94.4 27; disc white 0.5 | 94.9 26.4; limb accent 2.3 | 72.6 39.4, 79 46, 89.4 46.4;
    disc metal 2 | 87.4 49.6""",
    # traveller with a suitcase
    """limb metal 1 | 28 57, 20 74; blob accent | 5 68, 5 68, 27 76, 27 76, 19 100, 19 100, -3
    92, -3 92; limb accent+ 0.9 | 11 71.6, 3.6 93.4; limb accent+ 0.9 | 20 75, 12.8 96.6; limb
    accent- 1 | 13 71, 15 66.4, 20 68.4, 19 73; disc ink 2.6 | 16.6 98.6, 1 93.4; limb coat-
    2.9 2.5 2.1 | 52 24, 58 36, 64 31; disc skin 2.2 | 65.4 30; poly shirt | 62.8 22, 69 23,
    67.4 31.4, 63.4 31; limb ink 0.8 | 62.6 21.8, 69.2 22.8; limb bottom- 5 4 3 | 47 52, 46 71,
    37 87; use shoe 1 | 37 91; limb bottom 5.2 4.1 3 | 49 52, 55 71, 61 91; use shoe 1 | 61 95;
    limb skin- 2.5 | 50 13, 49.4 20; blob coat | 44.6 19, 53 18.4, 57 24.6, 56 38, 59.4 63,
    59.4 63, 40.4 64.4, 40.4 64.4, 42.4 38, 41.4 25; limb coat- 0.5 | 54.4 27, 55.4 62.6; use
    long 1.18 | 51 9; limb coat+ 3.3 2.7 2.3 | 46 24.4, 38.6 38, 31 53; disc skin 2.3 | 29.6
    55.6""",
    # dancer
    """limb skin- 2.5 2 1.7 | 55 26, 70 23, 80 10; disc skin- 1.8 | 80.6 9; limb skin- 4.4 3.4
    2.2 | 47 55, 30 60, 13 51; limb accent 2.4 1.9 1.1 | 14 51.6, 9 48, 3.4 45; limb skin 4.6
    3.5 2.3 | 51 57, 53 76, 53 90; limb accent 2.5 2 1.2 | 53 89.6, 53.6 94, 55 100.6; limb
    skin- 2.5 | 53.4 16, 52 23; blob skin | 46 26, 52 22, 57.6 25, 56 29, 48 29.6; blob accent
    | 46.6 25, 46.6 25, 51.6 28, 57.2 24.4, 57.2 24.4, 58 32, 55 43, 46.4 43, 45.4 32; blob
    accent- | 46.6 42, 55 42, 70 53, 73 59, 60 57, 50 61.6, 40 58, 27 60, 31 52; blob accent+ |
    46.6 41.4, 55 41.4, 68 49, 75 54.6, 61 53.4, 51 57, 40 54, 25 54.6, 33 48; limb white 0.8 |
    46.4 41.8, 50.6 42.8, 55 41.8; use bun 1.14 | 54.8 11; limb skin 2.6 2.1 1.7 | 48 26.6, 34
    21, 27 5; disc skin 1.8 | 26.6 3.6""",
    # cat
    """limb fur- 3.2 3.4 3.6 3 | 38 91, 18 92, 12 78, 20 66; limb cream 3.1 2.4 | 18 69, 22.4
    64; blob fur | 51 38, 70 38, 73 62, 70 96, 70 96, 40 98, 30 90, 31 74, 42 57, 48 46; blob
    cream | 64 48, 70 56, 69 72, 63 76, 60 62; limb fur- 4.4 3.6 3.2 | 60 66, 60 82, 60 95;
    limb fur 4.8 3.8 3.3 | 67 64, 68 82, 68 95; disc cream 4.6 2.8 | 62 97, 71 97; limb fur+
    11.6 9 | 43 82, 44 89; disc cream 6.4 3 | 50 97; limb fur- 1 | 51 64, 46 68; limb fur- 1 |
    49 58, 44.6 62; poly fur- | 47 26, 47.6 7, 59 17; poly fur- | 65 17, 76 7, 77 26; poly pink
    | 50 22, 50 12, 56 18; poly pink | 68.6 18, 74 12, 74.4 22; disc fur 16.4 13.6 | 62 28;
    blob cream | 62 30, 69.4 32.6, 69.6 38.6, 62 41, 54.4 38.6, 54.6 32.6; limb fur- 1.1 | 62
    15.4, 62 20.4; limb fur- 1 | 57.6 16.2, 58.4 20; limb fur- 1 | 66.4 16.2, 65.6 20; disc
    leaf 2.6 3 | 55.6 27.4, 68.4 27.4; disc ink 1.2 2.5 | 55.8 27.4, 68.2 27.4; poly pink- | 60
    31.6, 64 31.6, 62 34; limb ink 0.5 | 62 34, 60.6 36.4, 58.4 36; limb ink 0.5 | 62 34, 63.4
    36.4, 65.6 36; limb accent 2 | 51 40.6, 61 44.4, 71 41; disc metal 2.1 | 62 47""",
    # jogger
    """limb skin- 2.5 2.2 1.9 | 55 25, 62 37, 72 30; disc skin- 2.1 | 73 29; limb skin- 4.4 3.5
    2.5 | 46 54, 38 72, 18 74; use shoe 0.95 | 15 75; limb bottom- 5.6 5 | 47 52, 42.4 64; limb
    skin 4.8 3.8 2.6 | 50 54, 65 66, 60 87; use shoe 0.95 | 60 91.4; limb skin- 2.6 | 55.4 15,
    53 21; blob top | 47.4 20, 55 18.8, 59.6 25, 57.4 40, 54.6 52, 54.6 52, 42 51, 42 51, 43.4
    38, 43.6 26; limb bottom 6 5.2 | 49 52, 59.6 61; limb bottom 6.2 | 47.4 51.4, 49.4 51.8;
    limb hair 2.2 1.9 0.8 | 51 8, 44 10, 40 17; use bun 1.14 | 57.4 9.8; limb accent 1.2 | 51.2
    6.4, 56.4 5, 62.6 6.6; limb top+ 3.2 2.8 | 48.6 24.6, 43.6 32; limb skin 2.6 2.3 1.9 | 43.2
    32.4, 38 39, 46.6 46.4; disc skin 2.3 | 47.8 47.2""",
    # lady with a wide hat
    """limb skin 3 2.5 2 | 45.4 66, 45 80, 43.8 92; limb skin 3 2.5 2 | 55.4 66, 55.8 80, 57
    92; blob shoe | 40.6 94, 43 91.4, 46.4 94, 46.4 99, 46.4 99, 38.4 99, 38.4 99; blob shoe |
    54.4 94, 57.8 91.4, 60.2 94, 62.4 99, 62.4 99, 54.4 99, 54.4 99; blob hair | 43.4 6, 57 6,
    59 16, 59.4 26, 50 24, 41 26, 41.4 16; limb skin- 2.5 | 50.2 14, 50.2 22; blob skin | 42
    24, 50.2 20.4, 58.6 24, 56 29, 44.6 29; blob top | 43 24, 43 24, 46 25, 50.2 28, 54.6 25,
    57.6 24, 57.6 24, 58 32, 56 42, 67 72, 67 72, 50 76, 33.6 72, 33.6 72, 44.4 42, 42.6 32;
    limb accent 1.7 | 44.6 42, 50 43, 56 42; limb shirt 0.9 | 35.6 68.4, 50 72, 65 68.4; disc
    skin 5.3 6.2 | 50.2 10; limb hair 1.9 2.4 1.6 | 44.6 7, 42.6 15, 43.4 25; limb hair 1.9 2.4
    1.6 | 55.8 7, 57.8 15, 57 25; disc ink 0.7 0.85 | 48.2 10.2, 52.4 10.2; limb pink- 0.5 |
    48.8 13.2, 50.3 13.8, 51.8 13.2; limb skin 2.6 2.1 1.8 | 58 26, 69 22, 62.6 7.6; disc straw
    16 4.4 | 50.2 4.4; blob straw+ | 42 4.4, 42.4 -3, 50.2 -5.6, 58 -3, 58.4 4.4, 50.2 6; blob
    accent | 42 1.4, 50.2 3, 58.4 1.4, 58.4 4.6, 50.2 6.2, 42 4.6; disc skin 2.1 | 63.4 6.2;
    limb skin 2.6 2.1 1.8 | 43 26, 36 36, 34 48; limb accent- 0.8 | 33 48, 29 56, 31 59; limb
    accent- 0.8 | 35 48, 38.6 56, 37 59; blob accent | 27.6 58, 27.6 58, 40.6 58, 40.6 58, 42.4
    71, 42.4 71, 25.8 71, 25.8 71; disc skin 2.1 | 34 49""",
)
_COLOURS = {
    "ink": "2a2c38",
    "metal": "b9bfca",
    "white": "ffffff",
    "pink": "ef9aa0",
    "cream": "fbeeda",
    "straw": "e9c879",
    "leaf": "8fbf5f",
    "shirt": "fdf8ee",
}
_WORN = ("skin", "hair", "top", "bottom", "shoe", "coat", "accent", "fur")
_OUTFITS = (
    "f0bd98 4a3128 2f7f86 34405e 7a4b34 3f5a80 e2703f c98a4b",
    "e8b08c 6b3a26 d65f4c 3b3f57 3d3a4a c9923e d6455d d9a25c",
    "c98f68 2b2226 e8a93a 33415f f2efe8 5a6fa8 2d8f8a 8a6a55",
    "f3c6a5 9c5a2c f2b84b 4a72a8 d9534f 7c9a5e e5484d 7d7f8c",
    "8a5a3f 221c22 5b8fc9 4a4458 e5e0d8 8a4f6d 3f9a6d d8924a",
    "f0c3a0 c98a3f f0ebe0 4b4f63 2f3140 b5543f 3b6ea5 5a5560",
    "b57a52 2a2024 7f67b5 3a4a63 e9e4da 4d8a78 d9588c b98a5e",
    "e9b491 7a4a2c c9505a 5d6b4a 5a3e33 38506e 3fa0b5 e0934a",
    "9c6644 1f1b20 f06a4a 2f3f5c f4f1ea 9a7fb5 ffd24a 6b5a52",
    "f1c5a6 5b3423 f2c14e 3d5a80 a8503f 6a8caf c8465a c4a27a",
)
_SHADOW = _rgb("32254f")


class _Part(NamedTuple):
    """Shapes filled together: ellipses (x, y, rx, ry) with a hole, or a polygon."""

    colour: RGB
    ellipses: list[tuple[float, float, float, float]]
    polygon: list[Point2]
    thickness: float  # sets how wide the shaded edge is
    hole: float = 0.0  # radius

    def bounds(self) -> tuple[float, float, float, float]:
        xs = [x for x, _ in self.polygon] + [x + d for x, _, r, _ in self.ellipses for d in (-r, r)]
        ys = [y for _, y in self.polygon] + [y + d for _, y, _, r in self.ellipses for d in (-r, r)]
        return min(xs), min(ys), max(xs), max(ys)


def _smooth(points: Sequence[Point2], closed: bool, spacing: float) -> list[Point2]:
    """Sample the Catmull-Rom curve through the points; a doubled point makes a corner."""
    count, curve = len(points), []
    for i in range(count if closed else count - 1):
        picks = (i - 1, i, i + 1, i + 2)
        if not closed:
            picks = (max(i - 1, 0), i, i + 1, min(i + 2, count - 1))
        knots = [points[k % count] for k in picks]
        (x0, y0), (x1, y1) = knots[1:3]
        steps = math.ceil(math.sqrt((x1 - x0) ** 2 + (y1 - y0) ** 2) / spacing)  # none if doubled
        for t in (step / steps for step in range(steps)):
            weights = (((2 - t) * t - 1) * t, (3 * t - 5) * t * t + 2, ((4 - 3 * t) * t + 1) * t, (t - 1) * t * t)
            curve.append(
                (
                    sum(w * x for w, (x, _) in zip(weights, knots, strict=True)) / 2,
                    sum(w * y for w, (_, y) in zip(weights, knots, strict=True)) / 2,
                )
            )
    return curve if closed else [*curve, points[-1]]


def _parse(text: str, colours: dict[str, RGB], scale: float, at: Point2) -> list[_Part]:
    """Read a list of parts, scaled and moved."""
    parts: list[_Part] = []
    for item in text.split(";"):
        head, _, tail = item.partition("|")
        operation, name, *rest = head.split()
        sizes = [float(number) * scale for number in rest]
        pairs = [pair.split() for pair in tail.split(",")]
        points = [(at[0] + float(x) * scale, at[1] + float(y) * scale) for x, y in pairs]
        if operation == "use":
            parts += _parse(_PARTS[name], colours, sizes[0], points[0])
            continue
        colour = colours[name.rstrip("+-")]
        if name[-1] in "+-":
            colour = _mix(colour, *((_SHADOW, 0.18) if name[-1] == "-" else (SUNLIT, 0.18)))
        if operation in ("blob", "poly"):
            outline = _smooth(points, True, 1.0) if operation == "blob" else points
            part = _Part(colour, [], outline, 8.0)
            left, top, right, bottom = part.bounds()
            parts.append(part._replace(thickness=min(8.0, (right - left) / 2, (bottom - top) / 2)))
        elif operation == "disc":
            ellipses = [(x, y, sizes[0], sizes[-1]) for x, y in points]
            parts.append(_Part(colour, ellipses, [], min(sizes)))
        elif operation == "ring":
            radius, wide = sizes
            ellipses = [(x, y, radius, radius) for x, y in points]
            parts.append(_Part(colour, ellipses, [], wide, radius - wide))
        else:  # a limb is a row of discs, dense enough to look like one stroke
            path = _smooth(points, False, 0.25 * min(sizes))
            places = np.linspace(0.0, len(sizes) - 1.0, len(path))
            radii = np.interp(places, np.arange(len(sizes)), sizes).tolist()
            ellipses = [(x, y, r, r) for (x, y), r in zip(path, radii, strict=True)]
            parts.append(_Part(colour, ellipses, [], max(sizes)))
    return parts


def _stamp(part: _Part, colour: Image.Image, alpha: Image.Image, corner: Point2, scale: float) -> None:
    """Paint a part, softly shaded on the right, on a canvas whose top left is at corner."""
    (left, top), (x0, y0, x1, y1) = corner, part.bounds()
    edge = int(part.thickness * 0.4 * scale) + 1  # width of the shaded side
    origin = int((x0 - left) * scale) - edge, int((y0 - top) * scale) - edge
    size = int((x1 - x0) * scale) + 2 * edge + 2, int((y1 - y0) * scale) + 2 * edge + 2
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)

    def place(x: float, y: float) -> Point2:
        return (x - left) * scale - origin[0], (y - top) * scale - origin[1]

    if part.polygon:
        draw.polygon([place(x, y) for x, y in part.polygon], fill=255)
    for x, y, rx, ry in part.ellipses:
        draw.ellipse([place(x - rx, y - ry), place(x + rx, y + ry)], fill=255)
        if part.hole:
            draw.ellipse([place(x - part.hole, y - part.hole), place(x + part.hole, y + part.hole)], fill=0)
    # Lit is what still lies inside after a step towards the shaded side.
    lit = ImageChops.darker(mask, ImageChops.offset(mask, -edge, -(edge // 3)))
    lit = lit.filter(ImageFilter.GaussianBlur(edge * 0.5))
    tile = Image.new("RGB", size, _mix(part.colour, _SHADOW, 0.24))
    tile.paste(part.colour, mask=lit)
    colour.paste(tile, origin, mask)
    alpha.paste(255, origin, mask)


def draw_figure(index: int, height: int = 210) -> NDArray[np.uint8]:
    """Draw a figure as a foreground cut-out, cropped tightly.

    The first ten are a walking man, a person with an umbrella, a cyclist, a child with a balloon,
    a dog, a traveller with a suitcase, a dancer, a cat, a jogger and a lady with a wide hat.
    Further ones repeat them in other colours, every second ten mirrored. The same arguments
    always give the same pixels.

    Parameters
    ----------
    index
        Which figure, 0 or more.
    height
        Height in pixels, 16 to 4096; the width follows from the figure.

    Returns
    -------
    figure
        (height, width, 4) uint8, RGBA with straight alpha; RGB is 0 where alpha is 0.

    Raises
    ------
    IndexError
        If index is negative.
    ValueError
        If height is out of range.
    """
    _check_index(index)
    _check_side("height", height)
    turn, kind = divmod(index, len(_FIGURES))
    outfit = dict(zip(_WORN, _OUTFITS[(kind + 3 * turn) % len(_OUTFITS)].split(), strict=True))
    colours = {name: _rgb(code) for name, code in (_COLOURS | outfit).items()}
    parts = _parse(_FIGURES[kind], colours, 1.0, (0.0, 0.0))
    boxes = np.array([part.bounds() for part in parts])
    (left, top), (right, bottom) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    scale = height * (3 if height <= 1024 else 2) / float(bottom - top)
    size = int((right - left) * scale) + 2, int((bottom - top) * scale) + 2
    colour, alpha = Image.new("RGB", size), Image.new("L", size)
    for part in parts:
        _stamp(part, colour, alpha, (float(left), float(top)), scale)

    # The canvas is black outside, so its colours shrink as premultiplied ones.
    box = alpha.getbbox() or (0, 0, *size)
    final = max(1, round((box[2] - box[0]) * height / (box[3] - box[1]))), height
    flat, cover = (np.asarray(layer.resize(final, Image.Resampling.BOX, box=box)) for layer in (colour, alpha))
    straight = np.rint(flat * 255.0 / np.maximum(cover, 1)[:, :, None]).clip(0.0, 255.0)
    straight[cover == 0] = 0.0
    picture = np.dstack([straight.astype(np.uint8), cover])
    return picture[:, ::-1].copy() if turn % 2 else picture


def write_sample_assets(
    folder: str | os.PathLike[str], n_backgrounds: int = 10, n_foregrounds: int = 10
) -> tuple[Path, Path]:
    """Write sample backgrounds (448 x 448 JPEG) and foregrounds (PNG, 210 high) as files.

    Parameters
    ----------
    folder
        Where to write; it and its two subfolders are created as needed.
    n_backgrounds, n_foregrounds
        How many files of each, 0 or more.

    Returns
    -------
    backgrounds, foregrounds
        The two subfolders, with street_00.jpg... and figure_00.png...

    Raises
    ------
    ValueError
        If a count is negative.
    OSError
        If a file or folder cannot be written.
    """
    if min(n_backgrounds, n_foregrounds) < 0:
        raise ValueError(f"counts must be 0 or more, got {n_backgrounds} and {n_foregrounds}")
    backgrounds, foregrounds = Path(folder) / "backgrounds", Path(folder) / "foregrounds"
    for path in (backgrounds, foregrounds):
        path.mkdir(parents=True, exist_ok=True)
    for index in range(n_backgrounds):
        picture = Image.fromarray(draw_street(index)[0])
        picture.save(backgrounds / f"street_{index:02d}.jpg", quality=92, subsampling=0)  # 4:4:4
    for index in range(n_foregrounds):
        Image.fromarray(draw_figure(index)).save(foregrounds / f"figure_{index:02d}.png")
    return backgrounds, foregrounds
