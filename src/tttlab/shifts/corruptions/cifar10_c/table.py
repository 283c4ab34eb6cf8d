"""The strengths of CIFAR-10-C: what its authors publish, for images of 32 pixels.

Reference: Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261, and the generator that they
publish with it, from which only the numbers are taken.
"""

from tttlab.shifts.corruptions.cifar10_c import blur, digital, noise, weather
from tttlab.shifts.corruptions.cifar10_c.blur import Disc, Glass, Motion
from tttlab.shifts.corruptions.cifar10_c.digital import Elastic, Saturation
from tttlab.shifts.corruptions.cifar10_c.weather import Fog, Frost, Snow, Spatter
from tttlab.shifts.corruptions.corruption import Corruption

# What the strengths are stands with the transforms. Lengths are in pixels.
TABLE = {
    "gaussian_noise": Corruption(noise.gaussian, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(noise.shot, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(noise.impulse, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(
        blur.defocus, (Disc(0.3, 0.4), Disc(0.4, 0.5), Disc(0.5, 0.6), Disc(1, 0.2), Disc(1.5, 0.1))
    ),
    "glass_blur": Corruption(
        blur.glass, (Glass(0.05, 1), Glass(0.25, 1), Glass(0.4, 1), Glass(0.25, 2), Glass(0.4, 2))
    ),
    "motion_blur": Corruption(
        blur.motion, (Motion(6, 1), Motion(6, 1.5), Motion(6, 2), Motion(8, 2), Motion(9, 2.5))
    ),
    # magnifications, of which each is larger by 0.01
    "zoom_blur": Corruption(blur.zoomed, (7, 12, 16, 21, 26)),
    "snow": Corruption(
        weather.snow,
        (
            Snow(0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            Snow(0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            Snow(0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            Snow(0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            Snow(0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(
        weather.frost,
        (Frost(1, 0.2), Frost(1, 0.3), Frost(0.9, 0.4), Frost(0.85, 0.4), Frost(0.75, 0.45)),
    ),
    "fog": Corruption(
        weather.fog, (Fog(0.2, 3), Fog(0.5, 3), Fog(0.75, 2.5), Fog(1, 2), Fog(1.5, 1.75))
    ),
    "brightness": Corruption(digital.brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(digital.contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        digital.elastic,
        (
            Elastic(0, 0, 2.56),
            Elastic(1.6, 6.4, 2.24),
            Elastic(2.56, 1.92, 1.92),
            Elastic(3.2, 1.28, 1.6),
            Elastic(3.2, 0.96, 0.96),
        ),
    ),
    # pixels along each side
    "pixelate": Corruption(digital.pixelate, (30, 28, 27, 24, 20)),
    "jpeg_compression": Corruption(digital.jpeg, (80, 65, 58, 50, 40)),
    "speckle_noise": Corruption(noise.speckle, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": Corruption(blur.gaussian, (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": Corruption(
        weather.spatter,
        (
            Spatter(0.62, 0.1, 0.7, 0.7, 0.5, muddy=False),
            Spatter(0.65, 0.1, 0.8, 0.7, 0.5, muddy=False),
            Spatter(0.65, 0.3, 1, 0.69, 0.5, muddy=False),
            Spatter(0.65, 0.1, 0.7, 0.69, 0.6, muddy=True),
            Spatter(0.65, 0.1, 0.5, 0.68, 0.6, muddy=True),
        ),
    ),
    # the first two make colours paler
    "saturate": Corruption(
        digital.saturate,
        (
            Saturation(0.3, 0),
            Saturation(0.1, 0),
            Saturation(1.5, 0),
            Saturation(2, 0.1),
            Saturation(2.5, 0.2),
        ),
    ),
}
