"""Words that generated tasks draw their keys, values and names from: short and common ones."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """apple arrow badge basket bell bird boat bottle box bread bridge brush bucket button cake
    camera candle card carpet castle chair clock cloud coat coin cup desk door dress drum engine
    fence flag flower fork garden gate glass guitar hammer hat horse house island jacket key
    kitchen knife lamp leaf letter map market mirror mountain nail needle ocean orange paper pencil
    piano pillow plate pocket ring river road roof rope salt school shirt shoe soap spoon stone
    street sugar table tent ticket tower train tree truck wall watch wheel window"""
)
ADJECTIVES = _words(
    """ancient angry bitter black blue brave bright broken brown calm cheap clean clever cold cool
    crazy dark deep dirty dry dull early empty fair famous fancy fast flat free fresh funny gentle
    giant golden grand gray great green happy hard heavy hidden hollow hot huge kind large late
    lazy light little lonely long loud lucky narrow new noisy old pink plain polite poor proud
    purple quick quiet rare red rich round royal sad sharp short silent silver simple slow small
    smooth soft sour strange strong sweet tall thick thin tiny warm weak white wide wild wise
    yellow young"""
)
FIRST_NAMES = _words(
    """Alice Anna Brian Carlos Clara David Diana Edward Elena Emma Eric Frank George Grace Hannah
    Henry Ivan Jack James Jane Julia Karen Kevin Laura Linda Louis Maria Mark Martin Mary Nina
    Oliver Oscar Paul Peter Rachel Robert Rosa Sarah Simon Sophie Susan Thomas Victor"""
)
LAST_NAMES = _words(
    """Adams Allen Baker Bell Bennett Brooks Brown Carter Clark Collins Cooper Cox Davis Evans
    Fisher Foster Gray Green Hall Harris Hill Howard Hughes Jackson Johnson Kelly King Lee Lewis
    Martin Miller Moore Morgan Nelson Parker Perry Reed Roberts Ross Scott Smith Stone Taylor
    Turner Walker Ward Watson White Wilson Wood Wright Young"""
)
