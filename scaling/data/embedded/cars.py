"""Design the embedded cars: draw proportions, colours and paint at random, and build the car from painted solids.

Design units: the car is 1 long (x from -0.5 to 0.5, forward), z = 0 is the ground, y = 0 is the middle.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling.data.embedded.solids import Cylinder, Floats, Paint, Polyhedron, Solid, box, plain, prism

Colour = tuple[float, float, float]
_DARK, _CHROME, _GLASS, _WHITE = (0.13, 0.13, 0.14), (0.75, 0.76, 0.78), (0.15, 0.2, 0.28), (0.9, 0.9, 0.88)


@dataclass(frozen=True)
class Kind:
    """The proportions of a kind of car.

    belt, roof, nose, tail: heights. screen, rear: x of the windscreen and of the rear window, at (belt line, roof).
    """

    belt: float
    roof: float
    nose: float
    tail: float
    screen: tuple[float, float]
    rear: tuple[float, float]


KINDS = {
    "saloon": Kind(0.205, 0.325, 0.155, 0.180, (0.18, 0.06), (-0.33, -0.21)),
    "estate": Kind(0.210, 0.340, 0.160, 0.205, (0.20, 0.08), (-0.46, -0.38)),
    "van": Kind(0.245, 0.440, 0.180, 0.240, (0.38, 0.27), (-0.475, -0.46)),
    "pickup": Kind(0.225, 0.370, 0.190, 0.215, (0.20, 0.10), (-0.10, -0.07)),
    "sports": Kind(0.175, 0.270, 0.120, 0.165, (0.12, -0.02), (-0.35, -0.16)),
}


@dataclass(frozen=True)
class Design(Kind):
    """The parameters that differ from car to car; lengths are in design units."""

    kind: str
    half_width: float
    clearance: float
    wheel_radius: float
    axles: tuple[float, float]  # x of the front axle and of the rear axle
    spokes: int
    glass_margin: float
    pillars: tuple[float, ...]  # x of the pillars between the side windows
    glazed_from: float  # x of the rear end of the side windows; panels are behind it
    paint: Colour
    second: Colour
    pattern: str
    bumper: Colour
    rim: Colour
    lamp_height: float
    lamp_width: float
    extras: frozenset[str]


def random_car(random: np.random.Generator) -> list[Solid]:
    """Draw a design and build its painted solids."""
    return _build(_draw(random))


def _draw(random: np.random.Generator) -> Design:
    # Ids seed the generator: if the draws changed their order, every car would change.
    name = str(random.choice(list(KINDS), p=[0.27, 0.2, 0.16, 0.15, 0.22]))
    kind = KINDS[name]
    # The heights share one shift, both ends of the windscreen another: the kind keeps its shape.
    rise, slide = random.uniform(-0.012, 0.012, 2), random.uniform(-0.02, 0.02, 3)
    belt = kind.belt + rise[0]
    roof = kind.roof + rise[0] + rise[1]
    screen = (kind.screen[0] + slide[0], kind.screen[1] + slide[0] + slide[1])
    # The tail of the body is at x = -0.487: the rear window starts in front of it, and never leans backwards.
    rear_base = max(kind.rear[0] + slide[2], -0.48)
    rear = (rear_base, max(kind.rear[1] + slide[2], rear_base + 0.01))
    axles = (random.uniform(0.29, 0.325), random.uniform(-0.325, -0.28))
    # The bonnet slopes down to the nose. Wheels stay below the bonnet and below the shoulders.
    slope = (kind.belt - kind.nose) / (0.487 - screen[0])
    wheel_top = min(kind.nose + rise[0] + slope * (0.487 - axles[0]), belt - 0.022) - 0.012
    paint = _random_paint(random)
    extras = {"roundel"} if name == "sports" and random.random() < 0.5 else set()
    if random.random() < {"sports": 0.7, "saloon": 0.15}.get(name, 0):
        extras.add("spoiler")
    if name in ("estate", "van") and random.random() < 0.5:
        extras.add("rack")
    middle = (screen[1] + rear[1]) / 2 + random.uniform(-0.01, 0.03)
    pillars = {"saloon": (middle,), "estate": (middle + 0.04, middle - 0.16), "van": (0.16, -0.08)}.get(name, ())
    return Design(
        kind=name,
        belt=belt,
        roof=roof,
        nose=kind.nose + rise[0],
        tail=kind.tail + rise[0],
        screen=screen,
        rear=rear,
        half_width=random.uniform(0.19, 0.215) + (0.012 if name in ("van", "pickup") else 0),
        clearance=0.04 if name == "sports" else random.uniform(0.045, 0.07),
        wheel_radius=min(random.uniform(0.066, 0.078) + (0.012 if name == "pickup" else 0), wheel_top / 2),
        axles=axles,
        spokes=int(random.integers(4, 9)),
        glass_margin=random.uniform(0.012, 0.022),
        pillars=pillars,
        glazed_from=0.16 if name == "van" and random.random() < 0.6 else -1.0,
        paint=paint,
        second=_random_paint(random) if random.random() < 0.5 else (_DARK if max(paint) > 0.5 else _WHITE),
        pattern=str(random.choice(["plain", "stripes", "single stripe", "two-tone", "band", "roof"])),
        bumper=_DARK if random.random() < 0.5 else paint,
        rim=_CHROME if random.random() < 0.7 else (0.35, 0.35, 0.37),
        lamp_height=random.uniform(0.024, 0.04),
        lamp_width=random.uniform(0.045, 0.08),
        extras=frozenset(extras),
    )


def _random_paint(random: np.random.Generator) -> Colour:
    """Draw a paint: mostly a strong colour, at times a grey, never white. White would vanish in the background."""
    if random.random() < 0.22:
        grey = float(random.choice([0.25, 0.62, 0.86]))
        return grey, grey, grey + 0.02
    return colorsys.hsv_to_rgb(random.random(), random.uniform(0.6, 0.95), random.uniform(0.55, 0.95))


def _array(colour: Colour) -> Floats:
    return np.array(colour, dtype=np.float32)


def _build(car: Design) -> list[Solid]:
    solids: list[Solid] = [*_body(car), _cabin(car), *_wheels(car), *_bumpers_and_lamps(car)]
    x, y, z = car.screen[0] - 0.035, car.half_width, car.belt
    for sign in (-1, 1):  # mirrors
        solids.append(box((x, sign * y - 0.017, z), (x + 0.02, sign * y + 0.017, z + 0.027), plain(car.paint)))
    if "spoiler" in car.extras:
        z, y = car.tail + 0.055, car.half_width - 0.02
        posts = [
            box((-0.455, s * 0.11 - 0.006, car.tail - 0.02), (-0.435, s * 0.11 + 0.006, z), plain(_DARK))
            for s in (-1, 1)
        ]
        solids += [box((-0.49, -y, z), (-0.41, y, z + 0.014), plain(car.second)), *posts]
    if "rack" in car.extras:
        solids += _rack(car)
    return solids


def _body(car: Design) -> list[Solid]:
    """Build the lower body. A pick-up's body ends behind the cabin; a bed between three walls follows."""
    sides, low = car.half_width, car.clearance
    front = [(0.44, low), (0.487, low + 0.03), (0.487, car.nose), (car.screen[0] + 0.01, car.belt)]
    # Half-spaces chamfer the shoulders, the corners of the nose and, except for a pick-up, those of the tail.
    cuts = [((0.0, sign, 1.0), sides + car.belt - 0.022) for sign in (-1.0, 1.0)]
    cuts += [((1.0, sign * 0.8, 0.0), 0.487 + 0.8 * sides - 0.055) for sign in (-1.0, 1.0)]
    paint = _body_paint(car)
    if car.kind != "pickup":
        cuts += [((-1.0, sign * 0.8, 0.0), 0.487 + 0.8 * sides - 0.045) for sign in (-1.0, 1.0)]
        tail = [(car.rear[0] - 0.005, car.belt), (-0.487, car.tail), (-0.487, low + 0.03), (-0.44, low)]
        return [prism([*front, *tail], sides, paint, cuts=cuts)]
    # Solids are convex, so a bed takes a floor and three walls.
    end, deck, wall = car.rear[0] - 0.02, car.belt - 0.075, 0.016
    return [
        prism([*front, (end, car.belt), (end, low)], sides, paint, cuts=cuts),
        prism([(end, low), (end, deck), (-0.487, deck), (-0.487, low + 0.03), (-0.44, low)], sides, paint),
        box((-0.487, -sides, deck), (-0.487 + wall, sides, car.tail), paint),
        box((-0.487, -sides, deck), (end, wall - sides, car.tail), paint),
        box((-0.487, sides - wall, deck), (end, sides, car.tail), paint),
    ]


def _body_paint(car: Design) -> Paint:
    """The livery with sills, door gaps and handles, roundel, wheel arches, grille and a pick-up's bed painted on it."""
    doors = [car.screen[0] - 0.02, *car.pillars[:1], car.rear[1] + 0.01 if car.kind in ("saloon", "pickup") else -0.12]

    def paint(points: Floats, normals: Floats) -> Floats:
        x, y, z = points.T
        colours = _livery(car, points, normals)
        on_side = np.abs(normals[:, 1]) > 0.6
        # Each detail overpaints those before it.
        colours[z < car.clearance + 0.022] = _DARK
        for door in doors:
            line = np.abs(x - door) < 0.0035
            colours[on_side & line & (z > car.clearance + 0.03)] *= 0.35
            handle = (np.abs(x - door - 0.022) < 0.012) & (np.abs(z - car.belt + 0.038) < 0.0045)
            colours[on_side & handle] = _CHROME
        if "roundel" in car.extras:
            disc = (x + 0.02) ** 2 + (z - 0.6 * car.belt) ** 2 < 0.034**2
            colours[on_side & disc] = _WHITE
        for axle in car.axles:
            arch = (x - axle) ** 2 + (z - car.wheel_radius) ** 2 < (1.14 * car.wheel_radius) ** 2
            colours[on_side & arch] = (0.05, 0.05, 0.05)
        grille = (np.abs(y) < 0.42 * car.half_width) & (np.abs(z - car.nose + 0.04) < 0.02)
        colours[(normals[:, 0] > 0.8) & grille] = _DARK
        colours[(normals[:, 2] > 0.9) & (x < car.rear[0]) & (z < car.belt - 0.05) & (car.kind == "pickup")] = _DARK
        return colours

    return paint


def _livery(car: Design, points: Floats, normals: Floats) -> Floats:
    """Colours [N, 3] of the two-colour pattern that body and cabin share."""
    _, y, z = points.T
    if car.pattern == "stripes":
        second = (normals[:, 2] > 0.25) & (np.abs(np.abs(y) - 0.04) < 0.02)
    elif car.pattern == "single stripe":
        second = (normals[:, 2] > 0.25) & (np.abs(y - 0.3 * car.half_width) < 0.035)
    elif car.pattern == "two-tone":
        second = z < 0.62 * car.belt
    elif car.pattern == "band":
        second = (np.abs(normals[:, 1]) > 0.6) & (np.abs(z - 0.68 * car.belt) < 0.018)
    elif car.pattern == "roof":
        second = z > car.belt + 0.001
    else:
        second = np.zeros(len(points), dtype=bool)
    return np.where(second[:, None], _array(car.second), _array(car.paint))


def _cabin(car: Design) -> Polyhedron:
    """Build the cabin: a prism that narrows towards the roof, with painted windows."""
    base = car.belt - 0.012
    profile = [(car.rear[0], base), (car.screen[0], base), (car.screen[1], car.roof), (car.rear[1], car.roof)]
    wide, narrow = car.half_width - 0.012, car.half_width - (0.03 if car.kind == "van" else 0.055)
    cuts = [((0.0, sign, 1.0), narrow + car.roof - 0.012) for sign in (-1.0, 1.0)]

    def paint(points: Floats, normals: Floats) -> Floats:
        x, y, z = points.T
        colours = _livery(car, points, normals)
        height = (z - base) / (car.roof - base)
        margin = car.glass_margin
        # The windscreen and the rear window lean: this is their x at the height of each point.
        front = car.screen[0] + (car.screen[1] - car.screen[0]) * height
        back = car.rear[0] + (car.rear[1] - car.rear[0]) * height
        in_band = (z > car.belt + 0.5 * margin) & (z < car.roof - 1.1 * margin)
        on_side = np.abs(normals[:, 1]) > 0.75
        beside = (x < front - 1.5 * margin) & (x > np.maximum(back + 1.5 * margin, car.glazed_from))
        for pillar in car.pillars:
            beside &= np.abs(x - pillar) > 0.007
        across = np.abs(y) < wide + (narrow - wide) * height - margin
        ahead = np.abs(normals[:, 0]) > 0.3
        glass = in_band & np.where(on_side, beside, across & ahead & (np.abs(normals[:, 1]) < 0.5))
        colours[glass] = _array(_GLASS) * (0.7 + 0.6 * height[glass, None])  # lighter at the top, like the sky
        return colours

    return prism(profile, wide, paint, top_half_width=narrow, cuts=cuts)


def _wheels(car: Design) -> list[Solid]:
    """Build four wheels that protrude a little from the sides of the body."""
    half, radius = 0.027, car.wheel_radius

    def painted(centre: NDArray[np.float32]) -> Paint:
        def paint(points: Floats, normals: Floats) -> Floats:
            x, _, z = (points - centre).T
            distance = np.hypot(x, z) / radius
            on_cap = np.abs(normals[:, 1]) > 0.9
            spoke = np.cos(np.arctan2(z, x) * car.spokes) > -0.1
            colours = np.full_like(points, 0.09)
            rim = on_cap & (distance < 0.68)
            colours[rim & (spoke | (distance < 0.24) | (distance > 0.58))] = car.rim
            return colours

        return paint

    places = [(axle, sign * (car.half_width + 0.007 - half), radius) for axle in car.axles for sign in (-1, 1)]
    centres = [_array(place) for place in places]
    return [Cylinder(centre, radius, half, painted(centre)) for centre in centres]


def _bumpers_and_lamps(car: Design) -> list[Solid]:
    low, sides = car.clearance + 0.012, car.half_width + 0.002
    solids: list[Solid] = []
    for end in (1, -1):
        profile = [(0.4 * end, low), (0.5 * end, low), (0.5 * end, low + 0.038), (0.4 * end, low + 0.038)]
        cuts = [((float(end), sign * 0.8, 0.0), 0.5 + 0.8 * sides - 0.055) for sign in (-1.0, 1.0)]
        solids.append(prism(profile[::end], sides, _bumper_paint(car), cuts=cuts))
        top = (car.nose if end > 0 else car.tail) - 0.012
        depth = 0.475 if car.kind == "pickup" and end < 0 else 0.45  # not through the rear wall into the bed
        outer = sides - 0.045
        lamp = plain((1.0, 0.96, 0.78) if end > 0 else (0.8, 0.06, 0.06))
        for sign in (-1, 1):
            x, y = sorted((end * depth, end * 0.492)), sorted((sign * (outer - car.lamp_width), sign * outer))
            solids.append(box((x[0], y[0], top - car.lamp_height), (x[1], y[1], top), lamp))
    return solids


def _bumper_paint(car: Design) -> Paint:
    def paint(points: Floats, normals: Floats) -> Floats:
        colours = np.broadcast_to(_array(car.bumper), points.shape).copy()
        plate = (np.abs(points[:, 1]) < 0.048) & (np.abs(normals[:, 0]) > 0.9)
        colours[plate & (np.abs(points[:, 2] - car.clearance - 0.031) < 0.013)] = _WHITE
        return colours

    return paint


def _rack(car: Design) -> list[Solid]:
    """Build a roof rack: two rails and four bars across them."""
    y, z, front, back = car.half_width - 0.085, car.roof, car.screen[1] - 0.04, car.rear[1] + 0.04
    rails = [
        box((back, sign * y - 0.007, z - 0.01), (front, sign * y + 0.007, z + 0.02), plain(_DARK)) for sign in (-1, 1)
    ]
    bars = [
        box((x - 0.008, -y, z + 0.006), (x + 0.008, y, z + 0.018), plain(_CHROME))
        for x in np.linspace(back + 0.03, front - 0.03, 4)
    ]
    return [*rails, *bars]
