"""What schemathesis sends where the description says that a picture belongs: real ones, of every kind that is taken."""

import base64

import schemathesis
from conftest import picture
from hypothesis import strategies

KINDS = strategies.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
COLORS = strategies.sampled_from(["red", "lime", "blue", "#123456"])
SIDES = strategies.tuples(strategies.integers(1, 40), strategies.integers(1, 40))
PICTURES = strategies.builds(
    lambda kind, color, size: picture("RGB", size, color, kind), KINDS, COLORS, SIDES
)
TEXTS = PICTURES.map(lambda data: base64.b64encode(data).decode())

schemathesis.openapi.format("byte", TEXTS)
schemathesis.openapi.format("binary", PICTURES)
for media in ("image/png", "image/jpeg", "application/octet-stream"):
    schemathesis.openapi.media_type(media, PICTURES)
