"""Word lists of the needle tasks. Pure data: their order fixes the token ids of the shipped model, so append only."""

# ruff: noqa: SIM905 - a split string keeps 700 words readable; a literal would be one word a line.

from __future__ import annotations

from typing import Final

SPECIAL: Final = ("<pad>", "<bos>", "<eos>", "<unk>")
DIGITS: Final = tuple("0123456789")
PUNCTUATION: Final = tuple(".,:;?!=+-()>|#")
LETTERS: Final = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

# Words of the task wordings, and a few spare ones that only random wordings use.
COMMON: Final = tuple(
    """
    the a an and in on at of to for with from is was are be it this that what which who how many much does has have
    had after before near under over then when where while by as but so or not no only all some one two three first
    last next question answer special magic number key pass remember value find code word words most frequent day
    start hop recall var equals total list note fact record secret access password token id item entry map go here
    there back again we grass green sky blue sun yellow says said tell me you please give now write read think step
    result done true false
    """.split()
)

# Keys of the needles and nodes of the pointer chase.
KEY_ADJECTIVES: Final = tuple(
    """
    amber azure brisk calm crimson daring eager fabled gentle golden hazy humble ivory jolly keen lively lunar
    mellow misty noble oaken ornate placid proud quaint quiet rapid ruby rustic scarlet silent silver snowy solar
    somber spicy stark stormy subtle sunny swift tidy timid tranquil urban vast velvet violet vivid wandering wary
    wild windy wise witty woven young zealous arctic bitter bold bright broad clever cosmic curious dapper distant
    dusty early eastern elder fancy feral floral frosty furry giant glassy grand hollow honest icy jagged jade kind
    large late lofty loyal lucky magnetic marble minor modern mossy muted narrow nimble northern odd opal pale
    patient plain polar polite prime pure rare regal rigid robust rough round royal
    """.split()
)
KEY_NOUNS: Final = tuple(
    """
    falcon harbor lantern meadow orchid pebble quartz raven saddle temple umbrella valley willow yacht zephyr anchor
    badger canyon dolphin ember feather glacier hammer island jacket kettle ladder magnet needle otter parrot quiver
    ribbon spindle thimble urchin violin walnut xylem yarrow zipper acorn beacon candle dagger engine fiddle goblet
    hornet inkwell jungle kernel lizard mirror nectar oyster puzzle quarry rocket saffron tunnel unicorn vessel
    wagon bamboo cactus domino easel fossil garnet helmet iguana jasmine kimono locket mantle nugget oboe pigeon
    quill ranch salmon tablet turnip vulture whistle almond basket cobalt donkey emblem ferry guitar hazel igloo
    jigsaw koala lemon muffin napkin olive pepper quince radish sailor tulip usher vapor wizard antler bonnet cedar
    drum eagle flute grape hedge iron jewel
    """.split()
)

# Chain-of-thought sums: who owns what, and what adds or removes.
NAMES: Final = tuple(
    """
    tom ann bob eve joe amy ben kim sam liz max sue dan joy leo may ron ida gus fay hal una ned pam roy tess vic wes
    abe bea cal dot
    """.split()
)
ITEMS: Final = tuple(
    """
    apples books coins pens cards stamps shells marbles cookies buttons tickets stones
    """.split()
)
GAIN_VERBS: Final = ("buys", "finds", "gets", "earns")
LOSS_VERBS: Final = ("sells", "loses", "drops", "spends")

# Filler: 14 nouns and 6 verbs a topic; the sentences of one stretch of filler share a topic.
TOPICS: Final = {
    "sea": (
        "wave boat tide coast reef gull shore sand storm deck sail net crew dock",
        "drifts floats rises sinks rolls crosses",
    ),
    "farm": (
        "barn cow field plow wheat corn goat fence hay tractor soil seed hen mill",
        "grows feeds digs grazes plants waters",
    ),
    "city": (
        "street tower bus shop office bridge crowd taxi lamp square station market train wall",
        "moves stops opens closes waits passes",
    ),
    "forest": (
        "tree leaf fern deer owl moss creek bark trail fox root branch pine bear",
        "hides stands falls climbs runs hunts",
    ),
    "space": (
        "star moon comet orbit planet probe crater signal dust galaxy nebula rocketship pilot dome",
        "spins glows lands burns orbits fades",
    ),
    "music": (
        "song piano choir note melody stage singer rhythm chord band horn opera drumbeat tune",
        "plays sings echoes repeats ends begins",
    ),
    "food": (
        "bread soup salt rice cheese oven plate cook sugar butter honey spice table knife",
        "bakes cools boils smells melts serves",
    ),
    "school": (
        "teacher desk chalk pupil lesson exam paper library test essay math class bell board",
        "writes learns reads asks studies counts",
    ),
    "law": (
        "judge court claim jury trial clause case lawyer witness contract oath fine verdict statute",
        "rules pleads argues signs denies appeals",
    ),
    "health": (
        "doctor nurse pulse fever bandage clinic bone heart lung pill vaccine cough dose scan",
        "heals rests treats breathes aches checks",
    ),
    "war": (
        "army fort shield spear king soldier siege banner sword camp horse scout truce border",
        "marches fights guards charges retreats yields",
    ),
    "code": (
        "server bug kernelmod thread cache loop array queue stack byte packet lock compiler graph",
        "runs crashes sorts copies waits merges",
    ),
}
FILLER_ADJECTIVES: Final = tuple(
    """
    old new small big dark light slow fast soft hard warm cold high low deep dry wet clean dull sharp heavy thin
    thick empty full strange common simple
    """.split()
)
FILLER_GLUE: Final = ("the", "a", "and", "in", "on", "of", "with", "near", "is", "was")
