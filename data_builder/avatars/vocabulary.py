"""Attribute values of the avatar world, as captions name them, with their names in the drawing
library.

Some hair types ignore the hair color or hide beard and glasses. They are left out, so that every
attribute is visible in every portrait.
"""

from typing import Final

HAIR: Final = {
    "big wavy": "BIG_HAIR",
    "bob": "BOB",
    "bun": "BUN",
    "side part": "CAESAR_SIDE_PART",
    "caesar": "CAESAR",
    "curly": "CURLY",
    "curvy": "CURVY",
    "dreads": "DREADS",
    "frizzle": "FRIZZLE",
    "headband afro": "FRO_BAND",
    "afro": "FRO",
    "shoulder": "LONG_NOT_TOO_LONG",
    "fringe bob": "MIA_WALLACE",
    "mullet": "SHAGGY_MULLET",
    "shaggy": "SHAGGY",
    "short curly": "SHORT_CURLY",
    "short dreads": "SHORT_DREADS_1",
    "spiky dreads": "SHORT_DREADS_2",
    "flat": "SHORT_FLAT",
    "round": "SHORT_ROUND",
    "waved": "SHORT_WAVED",
    "balding": "SIDES",
    "straight": "STRAIGHT_1",
    "strand": "STRAIGHT_STRAND",
    "braids": "BRAIDS",
    "updo": "BRIDE",
    "buzzcut": "BUZZCUT",
    "cornrows": "CORNROWS",
    "dreadlocks": "DREADLOCKS",
    "genius": "EINSTEIN_HAIR",
    "elvis": "ELVIS",
    "spiky": "EVIL_SPIKE",
    "shaved": "HALF_SHAVED",
    "mohawk": "MOHAWK",
    "messy": "MOWGLI",
    "pixie": "PIXIE",
    "pompadour": "POMPADOUR",
    "quiff": "QUIFF",
    "long twist": "TWIST_LONG_HAIR",
    "parted twist": "TWIST_LONG_HAIR_2",
    "lank": "WICK",
    "wild": "WILD",
}
FACIAL_HAIR: Final = {
    "none": "NONE",
    "light beard": "BEARD_LIGHT",
    "majestic beard": "BEARD_MAGESTIC",
    "full beard": "BEARD_MEDIUM",
    "fancy moustache": "MOUSTACHE_FANCY",
    "magnum moustache": "MOUSTACHE_MAGNUM",
    "bushy moustache": "EINSTEIN_MOUSTACHE",
    "goatee": "WICK_BEARD",
}
NOSE: Final = {"plain": "DEFAULT", "small": "SMALL", "wide": "WIDE"}
EYEBROWS: Final = {
    "natural": "DEFAULT_NATURAL",
    "arched": "DEFAULT",
    "flat": "FLAT_NATURAL",
    "raised": "RAISED_EXCITED_NATURAL",
    "joined": "UNIBROW_NATURAL",
}
HAIR_COLOR: Final = {
    "auburn": "#A55728",
    "black": "#2C1B18",
    "blonde": "#B58143",
    "golden": "#D6B370",
    "brown": "#724133",
    "dark": "#4A312C",
    "pink": "#F59797",
    "platinum": "#ECDCBF",
    "red": "#C93305",
    "gray": "#B7B7B7",
}
SKIN: Final = {
    "tanned": "#FD9841",
    "yellow": "#F8D25C",
    "pale": "#FFDBB4",
    "light": "#EDB98A",
    "brown": "#D08B5B",
    "dark": "#AE5D29",
    "black": "#614335",
}
EXPRESSION: Final = {
    "smiling": "SMILE",
    "laughing": "BIG_SMILE",
    "neutral": "TWINKLE",
    "serious": "SERIOUS",
    "sad": "SAD",
    "screaming": "SCREAM_OPEN",
    "grimacing": "GRIMACE",
    "tongue out": "TONGUE",
}
EYES: Final = {
    "open": "DEFAULT",
    "closed": "CLOSED",
    "happy": "HAPPY",
    "surprised": "SURPRISED",
    "rolling": "EYE_ROLL",
    "heart": "HEART",
    "winking": "WINK_WACKY",
    "side": "SIDE",
}
GLASSES: Final = {
    "none": "NONE",
    "glasses": "PRESCRIPTION_2",
    "round glasses": "ROUND",
    "sunglasses": "WAYFARERS",
    "white sunglasses": "KURT",
    "eyepatch": "EYEPATCH",
}
GARMENT: Final = {
    "hoodie": "HOODIE",
    "sweater": "COLLAR_SWEATER",
    "t-shirt": "SHIRT_CREW_NECK",
    "v-neck": "SHIRT_V_NECK",
    "overall": "OVERALL",
    "blazer": "BLAZER_SHIRT",
    "tuxedo": "BOND_SUIT",
    "robe": "JEDI_ROBE",
    "spacesuit": "ASTRONAUT_SUIT",
    "chef jacket": "CHEF",
}
COLORLESS_GARMENTS: Final = frozenset({"spacesuit"})  # the drawing ignores the garment color
GARMENT_COLOR: Final = {
    "black": "#262E33",
    "blue": "#2E6BD0",
    "navy": "#25406B",
    "gray": "#929598",
    "green": "#3F9A4B",
    "orange": "#F08A24",
    "yellow": "#F2D43A",
    "pink": "#FF7FB6",
    "red": "#E03131",
    "white": "#F7F7F7",
    "purple": "#7B3FA0",
}
BACKGROUND: Final = {
    "white": "#FFFFFF",
    "black": "#1B1B1B",
    "gray": "#A9AEB4",
    "sky": "#8FD0FF",
    "blue": "#3C64C8",
    "green": "#6FC36B",
    "orange": "#FFB366",
    "pink": "#FFC4DD",
    "red": "#D9534F",
    "purple": "#9A7BD0",
}
HAT: Final = {
    "none": "NONE",
    "hat": "HAT",
    "hijab": "HIJAB",
    "turban": "TURBAN",
    "winter hat": "WINTER_HAT_2",
}
STYLE: Final = ("plain", "grayscale", "sepia", "pencil", "pixel", "negative")
TONE: Final = ("plain", "dark", "bright", "warm", "cold", "soft")
"""Light over the whole image. Captions and prompts never name it; only before/after pairs change
it.
"""
IDENTITY_ATTRIBUTES: Final = {
    "hair": tuple(HAIR),
    "hair_color": tuple(HAIR_COLOR),
    "skin": tuple(SKIN),
    "facial_hair": tuple(FACIAL_HAIR),
    "facial_hair_color": tuple(HAIR_COLOR),
    "nose": tuple(NOSE),
    "eyebrows": tuple(EYEBROWS),
}
PROMPT_ATTRIBUTES: Final = {
    "expression": tuple(EXPRESSION),
    "eyes": tuple(EYES),
    "glasses": tuple(GLASSES),
    "garment": tuple(GARMENT),
    "garment_color": tuple(GARMENT_COLOR),
    "background": tuple(BACKGROUND),
    "hat": tuple(HAT),
    "style": STYLE,
}
GEOMETRY: Final = ("eye_distance", "eye_height", "nose_scale", "mouth_scale", "face_width")


def resolve_color(table: dict[str, str], value: str) -> str:
    """Return the ``#rrggbb`` code of a color.

    Args:
        table: Color codes by color name, e.g. ``HAIR_COLOR``.
        value: Name in ``table``, or a code ``#rrggbb``, which is returned as it is.

    Returns:
        The color as ``#rrggbb``.

    Raises:
        KeyError: If ``value`` is neither a code nor a name in ``table``.
    """
    return value if value.startswith("#") else table[value]
