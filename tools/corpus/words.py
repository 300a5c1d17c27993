"""Words that prompts are drawn from: things, people and places that a small child knows."""


def entries(text: str) -> tuple[str, ...]:
    """Entries that stand between bars."""
    return tuple(" ".join(entry.split()) for entry in text.split("|"))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Facts of recall documents are about other people, so that no story contradicts one.
NAMES = _words(
    """Mia Tom Anna Ben Lily Sam Ella Max Lucy Jack Zoe Leo Emma Noah Ruby Finn Rosie Tim Daisy
    Oscar Kate Billy Molly Joe Sue Dan Amy Luke Nora Peter Jane Toby Ivy Adam Grace Will Poppy Fred
    Holly Harry Maya Omar Lena Ravi Aisha Carlos Mei Yusuf Nina Kofi Elsa Hugo Tara Ali Sofia
    Marco Priya Jonas Olga Felix"""
)
PEOPLE = entries(
    """a little girl | a little boy | a young farmer | an old baker | a kind teacher | a tired
    nurse | a brave fireman | a shy painter | a busy cook | a grandmother | a grandfather | a
    poor fisherman | a small king | a lost sailor | a new pupil | a funny clown | a bus driver
    | a gardener | a doctor | a shop keeper | a singer | a builder | a post woman | a shepherd
    | a neighbor | a twin | a carpenter | a little princess | a young soldier"""
)
ANIMALS = entries(
    """a rabbit | a fox | a bear | a mouse | a cat | a dog | a duck | a frog | an owl | a
    squirrel | a hedgehog | a pony | a cow | a goat | a sheep | a pig | a hen | a goose | a
    turtle | a snail | a bee | an ant | a butterfly | a whale | a dolphin | a crab | a penguin
    | a seal | an elephant | a lion | a monkey | a giraffe | a zebra | a parrot | a swan | a
    mole | a deer | a beaver | a bat | a spider"""
)
PLACES = entries(
    """in the forest | by the sea | on a farm | in a small town | in a big city | at school |
    in the kitchen | in the garden | on a hill | by the river | in the snow | on a small island
    | at the market | in the park | in an old house | on a train | in a tall tree | in the
    library | at the zoo | in a cave | on a boat | under the bridge | in the barn | at the lake
    | in the desert | in a quiet village | in the attic | at the playground | in a bakery | in
    the mountains | on the bus | at the beach | in the meadow | in a workshop | at a birthday
    party | in the hospital | in the rain | at night in bed | on the roof | at the harbor"""
)
OBJECTS = entries(
    """a red ball | a kite | an old clock | a key | a lamp | a blue cup | a warm coat | a drum
    | a wooden box | a letter | a map | a bell | a pair of boots | a small boat | a basket of
    apples | a loaf of bread | a hat | a mirror | a rope | a ladder | a book | a candle | a
    bucket | a blanket | a shiny stone | a feather | a toy train | a doll | a bicycle | a
    broken chair | a pumpkin | a jar of honey | an umbrella | a cake | a pencil | a flute | a
    snowman | a bag of seeds | a ring | a spoon | a paper plane | a nest | a shell | a flag | a
    wheel | a scarf | a tent | a garden gate | a puzzle | a cookie"""
)
EVENTS = entries(
    """loses something and looks for it | finds something strange | makes a new friend | is
    afraid of the dark | helps someone who is hurt | learns to swim | shares lunch with a
    stranger | gets lost and finds the way home | tells a lie and then the truth | plants a
    seed and waits | builds something with friends | has a bad day that ends well | hears a
    noise at night | wins nothing but is happy | breaks something by mistake | wants to fly |
    waits for the rain to stop | makes a gift for someone | learns to say sorry | moves to a
    new home | saves a small animal | gets a letter from far away | cooks soup for everyone |
    is too small to help and then helps | tries again and again | forgets a birthday | sees
    snow for the first time | goes on a short trip | learns to wait | finds out that a friend
    is sad | cleans up a big mess | stays up too late | meets someone who is different | gives
    away a favorite thing | solves a small mystery | follows a trail of footprints | cannot
    sleep | has to be brave at the doctor | looks after a baby | runs a race"""
)
MOODS = entries(
    """happy | calm | funny | a little sad | exciting | warm | sleepy | surprising | brave |
    gentle | hopeful | quiet"""
)
MOMENTS = entries(
    """One morning | One evening | Last summer | On a rainy day | On a cold day | It was a
    sunny day when | Every day | One night | Long ago | In the spring | Before breakfast |
    After school | On Sunday | Once | It was late, and | It was snowing, and | Today |
    Yesterday | On the first day of winter | One windy afternoon | It was dark when | As the
    sun came up | When the bell rang | At noon"""
)
QUESTIONS = entries(
    """why the sky is blue | why it rains | how a seed becomes a plant | why we sleep | where
    milk comes from | how birds fly | why leaves fall in autumn | what the moon is | why the
    sea is salty | how bees make honey | why we brush our teeth | how bread is made | why ice
    melts | what a shadow is | how fish breathe | why we have two eyes | what clouds are made
    of | how a boat floats | why the sun is hot | how a clock works | what a friend is | why we
    say thank you | how a spider makes a web | why cats purr | how a bicycle stays up | what
    wind is | why we eat fruit | how a candle burns | what a map is for | why stars shine at
    night | how a letter gets to a house | what money is for | why dogs bark | how wool becomes
    a sweater | why we wash our hands | what a farmer does | what a doctor does | how a train
    moves | why the days are long in summer | what an island is | how snow is made | why we
    need trees | what a library is | how butter is made | why a ball bounces | how plants drink
    | what a rainbow is | why we cry | how a magnet works | what a bridge is for | why soap
    cleans | how caterpillars become butterflies | why we wear coats in winter | what a family
    is | how glass is made | why some animals sleep all winter | how we hear sounds | what a
    year is | why a stone sinks | how eggs become chicks | what a fire needs | why we take
    turns | how a river begins | what bones are for | why the moon changes its shape | what
    thunder is | how paper is made | why we rest when we are ill | what a desert is | how a
    ship finds its way"""
)
TASKS = entries(
    """make a sandwich | plant a seed | wash a dog | draw a cat | make a bed | pack a bag for
    school | build a snowman | make lemonade | wrap a gift | tie a shoe | feed a bird | clean a
    room | make a paper boat | set the table | brush your teeth | cross the road safely | bake
    cookies with a grown-up | make a new friend | say sorry | calm down when you are angry |
    water a plant | fly a kite | make a fruit salad | find a lost toy | write a letter to a
    grandmother | look after a kitten | get ready for bed | ride a bicycle | play hide and seek
    | build a sand castle | make a fort from blankets | learn a song | help in the kitchen |
    care for a sick friend | pick apples | make a bird house | blow a soap bubble | keep a
    secret | share a toy | make soup | wash your hands | paint a picture | jump rope | tell a
    joke | grow tomatoes | read a map | make a mask | catch a ball | climb a tree safely | save
    water"""
)
THINGS = entries(
    """a market | a forest in autumn | a kitchen in the morning | the sea on a windy day | a
    farm | a train station | a snowy street | a garden full of flowers | a thunderstorm | a toy
    shop | a birthday party | a sleeping cat | a happy dog | an old house | a lighthouse | a
    pond with frogs | a starry night | a busy street | a school room | a bakery | a little boat
    | a castle | a bird nest | a summer day | a playground | a river | a bus full of people | a
    warm bed | a bowl of soup | a mountain | a cave | a circus | a library | a tree house | a
    picnic | a harbor | a rainy window | a campfire | a carrot patch | a bridge in the fog"""
)
