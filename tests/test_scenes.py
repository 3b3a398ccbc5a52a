"""The synthetic scenes: the same every time, exact depth, captions that are true, files that read back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diff2flow_nodes.bench import scene_light, scene_plan, scene_rays, scenes
from diff2flow_nodes.bench.scene_plan import Scene, Solid, Surface

torch.set_num_threads(1)

COUNT = 48
_COAT = Surface("plain", ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), 0.3)


@pytest.fixture(scope="module")
def made() -> scenes.Scenes:
    return scenes.scenes(range(COUNT), seed=3)


def test_a_scene_depends_on_its_index_and_seed_alone(made: scenes.Scenes) -> None:
    again = scenes.scenes([31, 5], seed=3)
    assert again.captions == [made.captions[31], made.captions[5]]
    assert torch.equal(again.depth, made.depth[[31, 5]]) and torch.equal(again.owners, made.owners[[31, 5]])
    torch.testing.assert_close(again.pictures, made.pictures[[31, 5]], atol=1e-5, rtol=0)
    other = scenes.scenes([5], seed=4)
    assert not torch.allclose(other.depth[0], made.depth[5])


def test_a_known_scene_stays_what_it_is() -> None:
    """Datasets and priors were made of these."""
    assert [scene_plan.plan(i, 0).caption for i in range(6)] == [
        "a purple box",
        "a yellow box",
        "a red cylinder left of a yellow sphere, and an orange sphere",
        "an orange box and a red torus",
        "a red torus",
        "a cyan torus in front of a blue cylinder",
    ]


def test_every_pixel_has_a_depth(made: scenes.Scenes) -> None:
    assert made.pictures.shape == (COUNT, 64, 64, 3) and made.depth.shape == (COUNT, 64, 64)
    assert made.depth.dtype == made.pictures.dtype == torch.float32
    assert made.depth.isfinite().all() and made.depth.min() > 0.8 and made.depth.max() < 9.0
    assert made.pictures.isfinite().all() and made.pictures.min() >= 0 and made.pictures.max() <= 1
    assert (made.pictures.flatten(1).std(dim=1) > 0.03).all()


def test_all_shapes_and_colours_are_there_and_can_be_seen(made: scenes.Scenes) -> None:
    solids = [solid for scene in made.attributes for solid in scene.solids]
    assert {solid.shape for solid in solids} == set(scene_plan.SHAPES)
    assert {solid.colour for solid in solids} == set(scene_plan.COLOURS)
    assert {len(scene.solids) for scene in made.attributes} == {1, 2, 3}
    for scene, owners in zip(made.attributes, made.owners, strict=True):
        assert owners.max() == len(scene.solids) - 1 and owners.min() == scene_rays.ROOM
        assert all((owners == slot).sum() >= 20 for slot in range(len(scene.solids))), scene.caption
        assert len({solid.colour for solid in scene.solids}) == len(scene.solids)


def test_a_solid_has_the_colour_of_its_name(made: scenes.Scenes) -> None:
    names = list(scene_plan.COLOURS)
    palette = torch.tensor(list(scene_plan.COLOURS.values()))
    right = []
    for scene, owners, picture in zip(made.attributes, made.owners, made.pictures, strict=True):
        for slot, solid in enumerate(scene.solids):
            seen = picture[owners == slot].median(dim=0).values
            nearest = torch.cosine_similarity(seen[None] - 0.1, palette - 0.1).argmax()
            right.append(names[int(nearest)] == solid.colour)
    assert sum(right) / len(right) > 0.8


def test_captions_are_true_of_the_pictures(made: scenes.Scenes) -> None:
    related = 0
    for scene, owners, depth, caption in zip(made.attributes, made.owners, made.depth, made.captions, strict=True):
        names = [solid.name for solid in scene.solids]
        assert all(name in caption for name in names) and caption.count(" a") + 1 >= len(names)
        if scene.relation is None:
            assert caption == scene_plan.listing(scene)
            continue
        related += 1
        i, word, j = scene.relation
        assert caption.startswith(f"{names[i]} {word} {names[j]}")
        columns = [torch.nonzero(owners == slot)[:, 1].double() for slot in (i, j)]
        depths = [depth[owners == slot] for slot in (i, j)]
        true = {
            "left of": columns[0].mean() + 3 < columns[1].mean(),
            "right of": columns[0].mean() - 3 > columns[1].mean(),
            "in front of": depths[0].max() < depths[1].min(),
            "behind": depths[0].min() > depths[1].max(),
        }
        assert true[word], caption
    assert related > 10


def _with(solid: Solid) -> Scene:
    return replace(scene_plan.plan(0, 0), solids=(solid,))


def _rays(scene: Scene, size: int) -> np.ndarray:
    """(3, size, size), from the camera's angles anew."""
    camera = scene.camera
    place = ((np.arange(size) + 0.5) / size * 2 - 1) * 0.5
    x, y = np.meshgrid(place, -place)
    up, ahead = y * math.cos(camera.pitch) - math.sin(camera.pitch), math.cos(camera.pitch) + y * math.sin(camera.pitch)
    sideways = x * math.cos(camera.yaw) + ahead * math.sin(camera.yaw)
    return np.stack([sideways, up, ahead * math.cos(camera.yaw) - x * math.sin(camera.yaw)])


def _room_depth(scene: Scene, rays: np.ndarray) -> np.ndarray:
    x, y, z = scene.camera.position
    planes = [
        (1, -y),
        (1, scene.height - y),
        (2, scene.back - z),
        (0, scene.half_width - x),
        (0, -scene.half_width - x),
    ]
    with np.errstate(divide="ignore"):
        steps = np.stack([offset / rays[axis] for axis, offset in planes])
    return np.where(steps > 0, steps, np.inf).min(axis=0)


def test_the_walls_are_where_the_rays_meet_them() -> None:
    for index in (0, 7, 20):
        scene = replace(scene_plan.plan(index, 0), solids=())
        out = scenes.rendered([scene], size=48)
        expected = _room_depth(scene, _rays(scene, 48))
        assert np.abs(out.depth[0].numpy() - expected).max() < 1e-5


def test_a_sphere_is_where_the_rays_meet_it() -> None:
    scene = _with(Solid("sphere", "red", (0.2, 0.7, 3.0), (0.7, 0.0, 0.0), 0.4, False, _COAT))
    rays = _rays(scene, 64)
    start = np.array(scene.camera.position) - np.array(scene.solids[0].centre)
    a, b, c = (rays**2).sum(0), np.tensordot(start, rays, 1), (start**2).sum() - 0.49
    under = b * b - a * c
    depth = np.where(under > 0, (-b - np.sqrt(np.maximum(under, 0))) / a, np.inf)
    out = scenes.rendered([scene])
    assert ((out.owners[0] == 0).numpy() == (under > 0)).all() and (under > 0).sum() > 200
    assert np.abs(out.depth[0].numpy() - np.minimum(depth, _room_depth(scene, rays))).max() < 1e-5


@pytest.mark.parametrize("shape", scene_plan.SHAPES)
@pytest.mark.parametrize("lying", [False, True])
def test_a_solid_begins_where_its_equation_says(shape: str, lying: bool) -> None:
    measures = {"sphere": (0.6, 0, 0), "box": (0.5, 0.3, 0.4), "torus": (0.5, 0.2, 0)}.get(shape, (0.45, 0.5, 0))
    solid = Solid(shape, "red", (0.1, 0.8, 3.0), tuple(map(float, measures)), 0.7, lying, _COAT)
    scene = _with(solid)
    rays, axes = _rays(scene, 64), np.array(solid.basis)
    start = axes @ (np.array(scene.camera.position) - np.array(solid.centre))
    ways = np.tensordot(axes, rays, 1)
    expected = _first_inside(shape, measures, start, ways)
    out = scenes.rendered([scene])
    depth, mine = out.depth[0].double().numpy(), (out.owners[0] == 0).numpy()
    assert mine.sum() > 150 and (mine == np.isfinite(expected)).mean() > 0.995
    both = mine & np.isfinite(expected)
    assert np.abs(depth - expected)[both].max() < 1e-4


def _first_inside(shape: str, measures: tuple, start: np.ndarray, ways: np.ndarray) -> np.ndarray:
    """Brute force: the first of many points on a ray that is within the solid, then halving."""
    times = np.linspace(1.5, 4.5, 3001)
    found = np.full(ways.shape[1:], np.inf)
    for late in times[1:]:
        new = np.isinf(found) & _within(shape, measures, start[:, None, None] + late * ways)
        found[new] = late
    near, far = found - (times[1] - times[0]), found.copy()
    for _ in range(30):
        middle = (near + far) / 2
        with np.errstate(invalid="ignore"):
            inside = _within(shape, measures, start[:, None, None] + middle * ways)
        near, far = np.where(inside, near, middle), np.where(inside, middle, far)
    return far


def _within(shape: str, measures: tuple, p: np.ndarray) -> np.ndarray:
    a, b, c = measures
    x, y, z = p
    across = np.hypot(x, z)
    return {
        "sphere": lambda: x * x + y * y + z * z < a * a,
        "box": lambda: (np.abs(x) < a) & (np.abs(y) < b) & (np.abs(z) < c),
        "cylinder": lambda: (across < a) & (np.abs(y) < b),
        "cone": lambda: (y > -b) & (across < a * (b - y) / (2 * b)),
        "torus": lambda: (across - a) ** 2 + y * y < b * b,
    }[shape]()


@pytest.mark.parametrize("shape", scene_plan.SHAPES)
def test_the_distance_is_a_distance(shape: str) -> None:
    """Its slope is 1 nearly everywhere, and its sign tells inside from outside."""
    random = torch.Generator().manual_seed(0)
    p = (torch.rand(3, 4000, generator=random, dtype=torch.float64) - 0.5) * 3
    measures = torch.tensor([0.7, 0.3, 0.5], dtype=torch.float64)[:, None].expand_as(p)
    p.requires_grad_(True)
    gap = scene_rays.distance(shape, p, measures)
    (slope,) = torch.autograd.grad(gap.sum(), p)
    length = slope.norm(dim=0)
    assert ((length - 1).abs() < 1e-6).double().mean() > 0.95
    inside = _within(shape, (0.7, 0.3, 0.5), p.detach().numpy())
    assert ((gap < 0).numpy() == inside).all()


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="'teapot'"):
        scene_rays.distance("teapot", torch.zeros(3, 1), torch.zeros(3, 1))


def test_a_solid_throws_a_shadow_and_lights_add_up() -> None:
    scene = _with(Solid("sphere", "red", (0.0, 0.5, 3.0), (0.5, 0.0, 0.0), 0.0, False, _COAT))
    light = scene_plan.Light((0.0, 2.5, 3.0), (0.7, 0.7, 0.7))
    scene = replace(scene, camera=scene_plan.Camera((0.0, 1.4, 0.0), 0.0, 0.3), lights=(light,), floor=_COAT)
    bright = replace(scene, lights=(light, light))
    world = scene_light.world_of([scene, replace(scene, solids=()), bright])
    down = torch.tensor([0.35, -1.4, 3.0], dtype=torch.float64)
    forward = down @ torch.tensor(scene.camera.basis[2], dtype=torch.float64)
    red = scene_light.seen(world, (down / forward)[:, None, None].expand(3, 3, 1))[0, :, 0]
    assert red[0] < 0.5 * red[1] and red[2] == pytest.approx(float(red[0]))


def test_sizes(made: scenes.Scenes) -> None:
    large = scenes.scenes([1], seed=3, size=128)
    assert large.pictures.shape == (1, 128, 128, 3)
    means = [
        torch.nn.functional.avg_pool2d(p.movedim(-1, 0), n) for p, n in ((large.pictures[0], 8), (made.pictures[1], 4))
    ]
    assert (means[0] - means[1]).abs().mean() < 0.02
    for size in (0, 60, 4):
        with pytest.raises(ValueError, match=f"not {size}"):
            scenes.scenes([0], 0, size)
    with pytest.raises(ValueError, match=r"\[-1\]"):
        scenes.scenes([-1], 0)
    with pytest.raises(ValueError, match=r"\[\]"):
        scenes.scenes([], 0)


@pytest.mark.parametrize("index", [0, 1, 4, 9])
def test_a_clip_moves_smoothly(index: int) -> None:
    frames = scenes.clip(index, seed=1, frames=9, size=32)
    assert frames.depth.shape == (9, 32, 32) and len(set(frames.captions)) == 1
    steps = (frames.pictures[1:] - frames.pictures[:-1]).abs().mean(dim=(1, 2, 3))
    assert steps.max() < 0.12 and (frames.pictures[-1] - frames.pictures[0]).abs().mean() > 0.005
    cameras = {scene.camera for scene in frames.attributes}
    solids = {scene.solids for scene in frames.attributes}
    assert sorted((len(cameras), len(solids))) == [1, 9]
    with pytest.raises(ValueError, match="not 1"):
        scenes.clip(0, 0, frames=1)
    with pytest.raises(ValueError, match="not -1"):
        scenes.clip(-1, 0, frames=2)


@pytest.mark.parametrize("depth_format", ["png16", "npy"])
def test_files_read_back(tmp_path: Path, depth_format: str, made: scenes.Scenes) -> None:
    paths = scenes.write(tmp_path, 3, seed=3, depth_format=depth_format)
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png"]
    picture = np.asarray(Image.open(tmp_path / "images" / "0001.png")) / 255.0
    assert np.abs(picture - made.pictures[1].numpy()).max() <= 0.51 / 255
    assert (tmp_path / "images" / "0001.txt").read_text() == made.captions[1] + "\n"
    expected = made.depth[1].numpy()
    if depth_format == "npy":
        assert np.array_equal(np.load(tmp_path / "depth" / "0001.npy"), expected)
    else:
        image = Image.open(tmp_path / "depth" / "0001.png")
        assert image.mode.startswith("I") and np.abs(np.asarray(image) / 1000.0 - expected).max() <= 0.00051
    assert not list(tmp_path.rglob("*.part"))


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'exr'"):
        scenes.write(tmp_path, 1, 0, depth_format="exr")
    for count in (0, 10_001):
        with pytest.raises(ValueError, match=f"not {count}"):
            scenes.write(tmp_path, count, 0)
