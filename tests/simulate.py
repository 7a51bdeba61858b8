"""Writes small simulated SEN12MS and DFC2020 trees, in the file layout and data types of the real ones.

    python tests/simulate.py OUT                     # 288 pairs in OUT/sen12ms, 96 + 160 labelled in OUT/dfc2020
    python tests/simulate.py OUT --size 256 --scenes 40 --patches 25 --seed 1

It is a stand-in for trying the scripts where the real data is not at hand. Its parameters are never tuned to make a row
of the tables win, and a score on it says nothing about satellites. Each tree holds a file SIMULATED that says so.

The model. A scene is one landscape: smooth random fields, one per class, race for every pixel, so that patches are
mixed and multi-label is real. S1 power = class mean x texture x speckle; S2 reflectance = (class spectrum x texture x
illumination + scattering in the air) x absorption. The sensors share the texture; a scene shifts the means of its
classes, each sensor's by its own draw. Some classes look alike to one sensor only: grassland and cropland (and savanna
and shrubland) in radar, barren and urban in optics. Scenes differ in haze, illumination, wind and season.

Where the magnitudes come from. None is fitted to a data set.
- Sigma nought: rounded typical C-band values at middle incidence: smooth water far below land (VV -20, VH -28 dB),
  closed canopies -8.5 and -14, cities about -5 through double bounce, short vegetation about -12 and -18.
- Speckle: gamma of unit mean with 4.4 looks, about what ESA states for IW GRD high resolution. Neighbouring pixels draw
  independently, unlike real ones.
- Spectra: rounded typical surface reflectances with the features that textbooks give: chlorophyll absorption in B4, red
  edge B5-B7, leaf water in B11-B12, water dark beyond B4, snow bright to B9 and dark in B11-B12.
- The air: scattering by molecules as wavelength^-4 from 0.10 at 443 nm, and haze as wavelength^-1.3, so stronger in the
  blue; water vapour leaves about 0.3 of B9 and nothing of B10 but thin cirrus. L1C without the offset of 2022.
- Everything else (texture, jitter, season, class shares) is a rounded guess; the shares are uneven as DFC2020's are.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data

# Rows: codes 1..10, Forest, Shrubland, Savanna, Grassland, Wetland, Cropland, Urban, Snow/Ice, Barren, Water. Columns:
# VV dB, VH dB, texture in dB, texture in log reflectance, shift of a scene in dB (wind on water), share that dries
SURFACE = np.array([
    [-8.5, -14.0, 0.8, 0.10, 1.0, 0.3],
    [-11.0, -17.5, 1.0, 0.12, 1.0, 0.4],
    [-11.5, -18.0, 1.0, 0.12, 1.0, 0.6],
    [-12.0, -18.5, 0.8, 0.08, 1.0, 0.6],
    [-10.5, -18.0, 1.5, 0.15, 1.5, 0.5],
    [-11.5, -18.0, 1.5, 0.12, 1.0, 0.8],
    [-5.0, -12.0, 2.5, 0.18, 1.0, 0.0],
    [-14.0, -21.0, 0.8, 0.05, 1.5, 0.0],
    [-14.5, -23.0, 1.2, 0.10, 1.0, 0.0],
    [-20.0, -28.0, 0.5, 0.06, 2.0, 0.0],
])
# Surface reflectance in %, vegetation at the height of its season, bands B1..B8, B8A, B9..B12
SPECTRA = np.array([
    [2.0, 2.5, 4.5, 3.0, 8.0, 20, 25, 26, 27, 27, 27, 14, 6.5],
    [4.0, 5.0, 7.5, 8.5, 13, 19, 22, 23, 25, 25, 25, 25, 17],
    [4.0, 5.0, 7.5, 8.0, 13, 20, 23, 24, 26, 26, 26, 25, 16],
    [3.5, 4.5, 8.5, 6.5, 13, 26, 31, 32, 34, 34, 34, 25, 14],
    [3.0, 3.5, 6.0, 5.0, 9.0, 16, 19, 20, 20, 20, 20, 12, 6.0],
    [3.0, 4.0, 7.5, 4.5, 11, 30, 37, 38, 40, 40, 40, 21, 11],
    [9.0, 10, 12, 13, 15, 17, 18, 19, 20, 20, 20, 21, 19],
    [90, 90, 88, 87, 86, 84, 82, 80, 78, 75, 50, 10, 8.0],
    [9.0, 10.5, 13, 15, 17, 18, 19, 20, 21, 21, 21, 25, 22],
    [5.0, 5.0, 4.5, 2.5, 2.0, 1.5, 1.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.4],
]) / 100
DRY = np.array([7, 8, 11, 14, 17, 19, 21, 23, 25, 25, 25, 31, 23]) / 100  # straw and soil, what vegetation dries to
WAVELENGTH = np.array([443, 490, 560, 665, 705, 740, 783, 842, 865, 945, 1375, 1610, 2190])  # nm
CELL = [6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 6, 2, 2]  # pixels of 10 m along a band's own cell
ABSORPTION = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 0.3, 0, 1, 1])
LOOKS = 4.4

# Shares of the ten codes, in %. Together they are about as uneven as DFC2020: much water, little shrubland and barren.
LANDSCAPES = np.array([
    [5, 0, 0, 5, 15, 5, 15, 0, 5, 50],    # coast
    [10, 0, 0, 15, 10, 45, 10, 0, 0, 10],  # farmland
    [35, 12, 0, 8, 0, 0, 0, 5, 15, 25],   # mountains with lakes
    [0, 0, 0, 5, 40, 15, 0, 0, 0, 40],    # delta
    [0, 22, 6, 32, 5, 10, 0, 0, 15, 10],  # steppe
    [5, 0, 0, 0, 10, 15, 25, 0, 0, 45],   # city on a bay
])
IGBP = ((1, 2, 3, 4, 5), (6, 7), (8, 9), (10,), (11,), (12, 14), (13,), (15,), (16,), (17,))  # that map to each code
SEASONS = {"ROIs1158_spring": 0.7, "ROIs1868_summer": 1.0, "ROIs1970_fall": 0.5, "ROIs2017_winter": 0.2}  # greenness

SEN12MS_LAYOUTS = {"release": "{roi}/{sensor}_{scene}", "archive": "{roi}_{sensor}/{sensor}_{scene}"}
DFC2020_LAYOUTS = {"release": "{roi}/{sensor}_{scene}", "split": "{sensor}_{split}", "flat": "{sensor}"}


def smooth_field(rng, n, slope):
    """White noise with its spectrum divided by frequency**slope: an (n, n) field of zero mean and unit variance."""
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n))
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, n))) / frequency**slope, (n, n))
    return (field / field.std()).astype(np.float32)


def class_map(rng, n, shares):
    """Codes 1..10, (n, n). Each class arrives at each pixel after a smooth, exponentially distributed time with its
    share as the rate; the first one takes the pixel, which happens with a probability equal to its share."""
    arrival = np.full((len(shares), n, n), np.inf, np.float32)
    for code in np.flatnonzero(shares):
        rank = smooth_field(rng, n, 1.6).ravel().argsort().argsort().reshape(n, n)
        arrival[code] = -np.log((rank + 0.5) / n**2) / shares[code]
    return arrival.argmin(0) + 1


def coarsen(image, cell):
    """Mean over cells of `cell` x `cell` pixels, at the size of the image."""
    n = len(image)
    padded = np.pad(image, (0, -n % cell), mode="edge")
    means = padded.reshape(len(padded) // cell, cell, -1, cell).mean((1, 3))
    return means.repeat(cell, 0).repeat(cell, 1)[:n, :n]


def radar(rng, classes, texture, sigma0):
    """S1 in dB, (2, n, n) float32, from each code's mean in dB, (10, 2)."""
    speckle = rng.gamma(LOOKS, 1 / LOOKS, (2, *classes.shape))
    decibel = sigma0.T[:, classes - 1] + SURFACE[classes - 1, 2] * texture
    return (decibel + 10 * np.log10(speckle)).astype(np.float32)


def optical(rng, classes, texture, spectra, air):
    """S2 top-of-atmosphere reflectance x 10,000, (13, n, n) uint16, from each code's spectrum, (10, 13)."""
    brightness = air["illumination"] * np.exp(SURFACE[classes - 1, 3] * texture)
    haze = air["haze"] * np.exp(0.4 * smooth_field(rng, len(classes), 2.0))
    s2 = np.empty((len(CELL), *classes.shape), np.uint16)
    for band, (wavelength, cell) in enumerate(zip(WAVELENGTH, CELL)):
        path = 0.10 * (443 / wavelength) ** 4 + haze * (550 / wavelength) ** 1.3
        reflectance = (spectra[classes - 1, band] * brightness + path) * ABSORPTION[band] + air["cirrus"]
        noise = rng.normal(0, 0.0005 * cell, classes.shape)  # 0.0005 in each of the band's own cells
        reflectance = coarsen(reflectance + noise, cell)
        s2[band] = np.clip(np.rint(reflectance * 1e4), 1, 65535)  # 0 is what real products use for no data
    return s2


def modis(classes, igbp):
    """`lc`, (4, n, n) uint16: the most frequent class of each 500 m cell as IGBP code; all layers repeat the first."""
    share = np.stack([coarsen(classes == code, 50) for code in range(1, 11)])
    return np.broadcast_to(igbp[share.argmax(0)], (4, *classes.shape)).astype(np.uint16)


def scene_images(key, sheet, n, shares, greenness):
    """One sheet of a scene: {"s1", "s2", "lc", "dfc"} -> (bands, n, n), and where it lies: CRS, easting and northing.

    key: integers that name the scene, the seed first. What holds for the scene as a whole is drawn from the key alone.
    """
    rng = np.random.default_rng([*key, 0])
    shift = rng.normal(0, SURFACE[:, 4:5], (10, 1)) + rng.normal(0, 0.5, (10, 2))  # both polarisations, then each
    sigma0 = SURFACE[:, :2] + shift
    dry = SURFACE[:, 5:] * (1 - greenness)
    spectra = (SPECTRA * (1 - dry) + DRY * dry) * rng.lognormal(0, 0.12, (10, 1)) * rng.lognormal(0, 0.05, (10, 13))
    air = {"haze": rng.exponential(0.015), "illumination": rng.normal(1, 0.08), "cirrus": rng.exponential(0.0008)}
    shares = shares * rng.lognormal(0, 0.25, 10)
    igbp = np.array([rng.choice(codes) for codes in IGBP])
    crs = CRS.from_epsg(32601 + int(rng.integers(60)))  # UTM, north
    corner = 10 * rng.integers([30_000, 100_000], [60_000, 700_000]) + [sheet * n * 10, 0]

    rng = np.random.default_rng([*key, 1 + sheet])
    classes = class_map(rng, n, shares / shares.sum())
    texture = smooth_field(rng, n, 0.8)
    images = {"s1": radar(rng, classes, texture, sigma0), "s2": optical(rng, classes, texture, spectra, air),
              "lc": modis(classes, igbp), "dfc": classes[None].astype(np.uint8)}
    return images, (crs, *corner)


def write_patch(out, layout, roi, scene, patch, images, place, box):
    """Cuts box = (top, left, size) out of the images and writes one GeoTIFF per sensor, under the published name."""
    top, left, size = box
    crs, east, north = place
    transform = rasterio.Affine(10, 0, east + 10 * left, 0, -10, north - 10 * top)
    for sensor, image in images.items():
        folder = out / layout.format(roi=roi, sensor=sensor, scene=scene, split=roi.split("_")[1])
        folder.mkdir(parents=True, exist_ok=True)
        with rasterio.open(folder / f"{roi}_{sensor}_{scene}_p{patch}.tif", "w", driver="GTiff", width=size,
                           height=size, count=len(image), dtype=image.dtype, crs=crs, transform=transform) as file:
            file.write(image[:, top : top + size, left : left + size])


def mark(out, command):
    """Writes the marker before anything else; raises FileExistsError where the folder holds other data than this."""
    marker = out / "SIMULATED"
    text = f"Simulated, not satellite data. Made by: python tests/simulate.py OUT {command}\n"
    if out.exists() and any(out.iterdir()) and not (marker.exists() and marker.read_text() == text):
        raise FileExistsError(f"{out} holds other data: remove it or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(text)


def simulate_sen12ms(out, scenes=12, patches=24, size=64, seed=0, layout="release"):
    """Writes `scenes` scenes of `patches` patches each (s1, s2, lc), spread over the seasons in turn, under `out`.

    layout: "release" (ROIs1158_spring/s1_1/) or "archive" (ROIs1158_spring_s1/s1_1/). A patch depends on the seed, the
    size and its own name, not on how many others are written. Raises FileExistsError where `out` holds other data.
    """
    out, folder, side = Path(out), SEN12MS_LAYOUTS[layout], 5  # a sheet is side x side patches
    mark(out, f"--seed {seed} --size {size} --scenes {scenes} --patches {patches} (SEN12MS, {layout} layout)")
    for number in tqdm(range(scenes), desc="SEN12MS scenes"):
        roi, greenness = list(SEASONS.items())[number % 4]
        shares = LANDSCAPES[(number + number // 4) % len(LANDSCAPES)]  # so that a season sees several landscapes
        for patch in range(patches):
            sheet, cell = divmod(patch, side * side)
            if cell == 0:
                images, place = scene_images((seed, 0, number), sheet, side * size, shares, greenness)
                del images["dfc"]
            box = (cell // side * size, cell % side * size, size)
            write_patch(out, folder, roi, 1 + number // 4, 30 + patch, images, place, box)  # real scenes start near p30


def simulate_dfc2020(out, train=96, test=160, size=64, seed=0, layout="release"):
    """Writes `train` patches of the validation split (the training set here) and `test` of the test split.

    layout: "release" (ROIs0000_validation/s1_0/), "split" (s1_validation/) or "flat" (s1/), for s1, s2 and dfc.
    Neighbours in number come from different landscapes in turn, so that a small tree has most classes; the splits share
    no place. A patch depends on the seed, the size and its own name. Raises FileExistsError like simulate_sen12ms.
    """
    out, folder, kinds, side = Path(out), DFC2020_LAYOUTS[layout], len(LANDSCAPES), 4
    block = kinds * side * side  # numbers shared by one scene of each landscape: first, first + kinds, ...
    mark(out, f"--seed {seed} --size {size} --dfc-train {train} --dfc-test {test} (DFC2020, {layout} layout)")
    for split, (roi, count) in enumerate([("ROIs0000_validation", train), ("ROIs0000_test", test)]):
        firsts = [number for number in range(count) if number % block < kinds]
        for scene, first in enumerate(tqdm(firsts, desc=f"DFC2020 {roi[9:]} scenes")):
            shares, greenness = LANDSCAPES[scene % kinds], list(SEASONS.values())[(scene + split) % 4]
            images, place = scene_images((seed, 1 + split, scene), 0, side * size, shares, greenness)
            del images["lc"]
            for cell, patch in enumerate(range(first, min(count, first + block), kinds)):
                write_patch(out, folder, roi, 0, patch, images, place, (cell // side * size, cell % side * size, size))


def main():
    parser = argparse.ArgumentParser(description="Write simulated SEN12MS and DFC2020 trees.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the trees become OUT/sen12ms and OUT/dfc2020")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=data.positive, default=64, help="pixels along a patch; the real ones have 256")
    parser.add_argument("--scenes", type=data.positive, default=12, help="SEN12MS scenes, over the four seasons in turn")
    parser.add_argument("--patches", type=data.positive, default=24, help="patches per SEN12MS scene")
    parser.add_argument("--dfc-train", type=data.positive, default=96, help="patches of DFC2020's validation split")
    parser.add_argument("--dfc-test", type=data.positive, default=160, help="patches of DFC2020's test split")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed: 0 or above")
    simulate_sen12ms(args.out / "sen12ms", args.scenes, args.patches, args.size, args.seed)
    simulate_dfc2020(args.out / "dfc2020", args.dfc_train, args.dfc_test, args.size, args.seed)


if __name__ == "__main__":
    data.run(main)
