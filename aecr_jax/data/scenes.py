"""Rooms drawn by the program: clear images with exact depth, which make it possible to run everything without a download.

A scene is a room with boxes and spheres, procedural textures and one lamp, ray-traced from a random camera position. It depends only on
its seed. Depth is the distance along the viewing direction, as a depth camera measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SUPERSAMPLING = 2


@dataclass(frozen=True)
class _Surface:
    """A sphere (`radius` > 0) or a box rotated by `angle` about the vertical axis; `inside` is set for the room itself."""

    centre: np.ndarray
    half: np.ndarray
    angle: float = 0.0
    radius: float = 0.0
    inside: bool = False


def render_scene(seed: int | tuple[int, ...], height: int = 240, width: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
      seed: selects the scene; the same seed gives the same scene.
      height: height of the image in pixels.
      width: width of the image in pixels.

    Returns:
      The clear image, float32 `[H, W, 3]` in [0, 1], and its depth, float32 `[H, W]`, 1 at the farthest pixel.
    """
    rng = np.random.default_rng(seed)
    surfaces, lamp, camera, view = _furnish(rng)
    rows, columns = height * _SUPERSAMPLING, width * _SUPERSAMPLING
    y, x = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
    focal = 0.9 * columns
    local = np.stack([(x - columns / 2) / focal, (rows / 2 - y) / focal, np.ones_like(x)], -1).reshape(-1, 3).astype(np.float32)
    rays = local @ view.T  # not normalised, so that the ray parameter is the depth along the viewing direction

    depth = np.full(len(rays), np.inf, np.float32)
    nearest = np.zeros(len(rays), np.int8)
    for index, surface in enumerate(surfaces):
        hit = _intersect(surface, camera, rays)
        closer = hit < depth
        depth[closer], nearest[closer] = hit[closer], index
    points = camera + rays * depth[:, None]

    colour = np.zeros_like(points)
    ambient = rng.uniform(0.15, 0.35)
    for index, surface in enumerate(surfaces):
        texture = _Texture(rng)
        seen = np.flatnonzero(nearest == index)
        if not seen.size:
            continue
        place = points[seen]
        normal, uv, face = _surface_frame(surface, place)
        albedo = texture(uv, face)
        to_lamp = lamp - place
        distance = np.linalg.norm(to_lamp, axis=1)
        lambert = np.maximum(np.sum(normal * to_lamp, 1) / distance, 0)
        shadow = np.zeros(len(seen), bool)
        for other in surfaces[1:]:
            toward = _intersect(other, place + normal * 1e-3, to_lamp)
            shadow |= toward < 0.999
        lit = 1.6 * lambert * np.where(shadow, 0.1, 1.0) / (1 + 0.06 * distance**2)
        colour[seen] = albedo * (ambient + lit)[:, None]
    colour *= np.array([1.0, rng.uniform(0.92, 1.0), rng.uniform(0.8, 1.0)], np.float32)  # the lamp's warmth
    colour /= max(1.0, float(np.percentile(colour, 99)))  # exposure
    colour = np.clip(colour, 0, 1) ** np.float32(1 / 1.6)
    image = _reduce(colour.reshape(rows, columns, 3))
    plane = _reduce(depth.reshape(rows, columns, 1))[..., 0]
    # Round to 8 bits, like a camera's image: the hazy images have 8 bits too.
    return np.round(image * 255).astype(np.float32) / 255, (plane / plane.max()).astype(np.float32)


def _furnish(rng: np.random.Generator) -> tuple[list[_Surface], np.ndarray, np.ndarray, np.ndarray]:
    """Return the surfaces (the room first), the positions of the lamp and the camera, and the camera's axes as columns."""
    room = np.array([rng.uniform(3, 7), rng.uniform(2.4, 3.2), rng.uniform(4, 10)])
    surfaces = [_Surface(centre=room / 2, half=room / 2, inside=True)]
    for _ in range(rng.integers(3, 8)):
        half = np.array([rng.uniform(0.15, 0.8), rng.uniform(0.15, 1.0), rng.uniform(0.15, 0.7)])
        place = np.array([rng.uniform(0.3, room[0] - 0.3), half[1], rng.uniform(1.4, room[2] - 0.4)])
        surfaces.append(_Surface(centre=place, half=half, angle=rng.uniform(0, np.pi / 2)))
        if rng.uniform() < 0.6:  # a sphere on top of the box
            radius = rng.uniform(0.1, 0.3)
            top = place + np.array([0, half[1] + radius, 0])
            surfaces.append(_Surface(centre=top, half=np.full(3, radius), radius=radius))
    for _ in range(rng.integers(1, 4)):  # spheres on the floor
        radius = rng.uniform(0.12, 0.5)
        place = np.array([rng.uniform(0.5, room[0] - 0.5), radius, rng.uniform(1.2, room[2] - 0.5)])
        surfaces.append(_Surface(centre=place, half=np.full(3, radius), radius=radius))
    lamp = np.array([rng.uniform(0.25, 0.75) * room[0], 0.92 * room[1], rng.uniform(0.2, 0.7) * room[2]])
    camera = np.array([rng.uniform(0.35, 0.65) * room[0], rng.uniform(1.1, 1.8), 0.15])
    yaw, pitch = rng.uniform(-0.35, 0.35), rng.uniform(-0.2, 0.05)
    forward = np.array([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
    right = np.cross([0, 1, 0], forward)
    right /= np.linalg.norm(right)
    view = np.stack([right, np.cross(forward, right), forward], 1)
    return surfaces, lamp.astype(np.float32), camera.astype(np.float32), view.astype(np.float32)


def _turn(vectors: np.ndarray, angle: float) -> np.ndarray:
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.stack([c * vectors[..., 0] - s * vectors[..., 2], vectors[..., 1], s * vectors[..., 0] + c * vectors[..., 2]], -1)


def _intersect(surface: _Surface, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Return the ray parameter of the first hit in front of `origin`, infinite where there is none."""
    origin = origin - surface.centre.astype(np.float32)
    if surface.radius:
        a = np.sum(rays * rays, -1)
        b = np.sum(origin * rays, -1)
        c = np.sum(origin * origin, -1) - np.float32(surface.radius**2)
        root = b * b - a * c
        hit = (-b - np.sqrt(np.maximum(root, 0))) / a
        return np.where((root > 0) & (hit > 0), hit, np.inf).astype(np.float32)
    half = surface.half.astype(np.float32)
    origin, rays = _turn(origin, surface.angle), _turn(rays, surface.angle)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = (-half - origin) / rays, (half - origin) / rays
    enter, leave = np.fmin(low, high).max(-1), np.fmax(low, high).min(-1)
    if surface.inside:
        return leave.astype(np.float32)
    return np.where((enter < leave) & (enter > 0), enter, np.inf).astype(np.float32)


def _surface_frame(surface: _Surface, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return unit normals `[P, 3]`, texture coordinates in metres `[P, 2]` and face indices `[P]`."""
    local = points - surface.centre.astype(np.float32)
    if surface.radius:
        normal = local / np.float32(surface.radius)
        angle = np.arctan2(normal[:, 0], normal[:, 2])
        uv = np.stack([angle, np.arcsin(np.clip(normal[:, 1], -1, 1))], -1) * np.float32(surface.radius)
        return normal, uv, np.zeros(len(points), np.int8)
    local = _turn(local, surface.angle)
    share = local / surface.half.astype(np.float32)
    axis = np.abs(share).argmax(-1)
    rows = np.arange(len(points))
    side = np.sign(share[rows, axis])
    normal = np.zeros_like(local)
    normal[rows, axis] = -side if surface.inside else side
    others = np.array([[2, 1], [0, 2], [0, 1]])[axis]
    uv = np.stack([local[rows, others[:, 0]], local[rows, others[:, 1]]], -1)
    return _turn(normal, -surface.angle), uv, (2 * axis + (side > 0)).astype(np.int8)


class _Texture:
    """The colours of one object; each face of a box has its own pattern."""

    def __init__(self, rng: np.random.Generator):
        hue = rng.uniform(0, 1, (6, 1))
        tint = 0.5 + 0.5 * np.cos(2 * np.pi * (hue + np.array([[0, 1 / 3, 2 / 3]])))
        saturation, bright = rng.uniform(0.05, 0.8, (6, 1)), rng.uniform(0.15, 0.9, (6, 1))
        self.base = (bright * (1 - saturation + saturation * tint)).astype(np.float32)
        # The darker colour is nearly black on many faces: dark places, which real rooms have everywhere, distinguish haze from pale walls.
        self.second = (self.base * rng.uniform(0.02, 0.5, (6, 1))).astype(np.float32)
        self.kind = rng.integers(0, 5, 6)
        self.scale = rng.uniform(1, 5, 6)
        self.seed = int(rng.integers(0, 2**31))

    def __call__(self, uv: np.ndarray, face: np.ndarray) -> np.ndarray:
        colour = np.empty((len(uv), 3), np.float32)
        for f in np.unique(face):
            here = face == f
            u, v = (uv[here] * np.float32(self.scale[f])).T
            noise = np.sum([_value_noise(u * k, v * k, self.seed + k) / k for k in (1, 2, 4, 8)], 0) / 1.875
            kind = self.kind[f]
            if kind == 0:  # checks
                mix = (np.floor(u) + np.floor(v)) % 2
            elif kind == 1:  # stripes
                mix = (np.sin(2 * np.pi * u) > 0.3).astype(np.float32)
            elif kind == 2:  # bricks
                shifted = u / 2 + 0.5 * (np.floor(v) % 2)
                mix = ((shifted % 1 < 0.06) | (v % 1 < 0.1)).astype(np.float32)
            elif kind == 3:  # wood
                mix = 0.5 + 0.5 * np.sin(6 * u + 9 * _value_noise(u * 0.7, v * 0.1, self.seed))
            else:  # marble, or plaster if the two colours are similar
                mix = noise
            mix = np.clip(0.85 * mix + 0.3 * (noise - 0.5), 0, 1)[:, None]
            colour[here] = self.base[f] * (1 - mix) + self.second[f] * mix
        return colour


def _value_noise(u: np.ndarray, v: np.ndarray, seed: int) -> np.ndarray:
    """Return smooth noise in [0, 1], interpolated from hashed lattice values."""
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    fu, fv = (u - i).astype(np.float32), (v - j).astype(np.float32)
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    table = np.random.default_rng(seed).random((64, 64), np.float32)

    def corner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return table[a % 64, b % 64]

    low = corner(i, j) * (1 - fu) + corner(i + 1, j) * fu
    return low * (1 - fv) + (corner(i, j + 1) * (1 - fu) + corner(i + 1, j + 1) * fu) * fv


def _reduce(x: np.ndarray) -> np.ndarray:
    h, w, c = x.shape
    s = _SUPERSAMPLING
    return x.reshape(h // s, s, w // s, s, c).mean((1, 3))
