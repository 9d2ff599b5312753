"""Word lists of the families that a base model may learn in-context classification from.

Each class has three lists, of nouns, adjectives and verbs, in that order. All lists are ours.
"""

from __future__ import annotations

from abft_mlx.data.generated._family import Family, lexicon

TOPIC = Family(
    name="topic",
    summary="what a headline is about",
    input_prefix="headline: ",
    label_prefix="topic:",
    signal=0.9,
    templates=(
        "A N V as the N met _a N",
        "the N V a A N _t",
        "_w says the N V every A N",
    ),
    classes={
        "sports": lexicon(
            "goal referee striker match stadium coach league racket sprinter trophy cyclist team",
            "athletic unbeaten injured sporty muscular agile offside tactical winning benched",
            "scored tackled dribbled sprinted defended equalised trained jumped raced swam",
        ),
        "money": lexicon(
            "bank loan broker market invoice budget share pension tax dividend currency deposit",
            "costly bankrupt fiscal wealthy profitable indebted taxable solvent frugal commercial",
            "invested borrowed traded sold audited priced insured saved lent refinanced",
        ),
        "science": lexicon(
            "atom telescope microbe laboratory planet molecule theory enzyme comet gene laser "
            "fossil",
            "chemical magnetic orbital cellular atomic solar experimental microscopic genetic "
            "lunar",
            "measured discovered observed evolved dissolved calculated cloned mapped tested "
            "detected",
        ),
        "music": lexicon(
            "violin chorus drummer melody concert guitar singer rhythm opera flute album orchestra",
            "acoustic melodic choral rhythmic tuneful lyrical jazzy harmonic operatic orchestral",
            "sang strummed composed hummed conducted rehearsed drummed performed recorded whistled",
        ),
    },
)

POLARITY = Family(
    name="polarity",
    summary="whether a film review likes the film",
    input_prefix="review: ",
    label_prefix="sentiment:",
    signal=0.85,
    templates=(
        "a A N that V the _n _t",
        "the A N V and the _n was A",
        "its N V me with A _n and N",
    ),
    classes={
        "negative": lexicon(
            "mess failure bore cliche waste disaster letdown flop chore insult muddle dud",
            "dull awful tedious clumsy boring shallow lifeless stale hollow dreary bland sloppy",
            "dragged failed bored annoyed disappointed stumbled irritated wasted flopped collapsed",
        ),
        "positive": lexicon(
            "gem triumph delight treasure masterpiece charm wit warmth treat wonder marvel beauty",
            "brilliant charming funny superb lovely clever touching fresh dazzling tender vivid "
            "witty",
            "shone delighted charmed thrilled amused sparkled enchanted impressed soared succeeded",
        ),
    },
)

SPEAKER = Family(
    name="speaker",
    summary="whose working day a line of speech comes from",
    input_prefix="line: ",
    label_prefix="speaker:",
    signal=0.85,
    templates=(
        "I V the A N and the N _t",
        "my N V before the A N came",
        "we V a N because the N was A",
    ),
    classes={
        "teacher": lexicon(
            "pupil lesson chalk homework classroom exam essay grammar textbook blackboard "
            "spelling quiz",
            "studious attentive educational absent bright lazy literate graded scholarly "
            "unprepared",
            "taught explained graded spelled corrected lectured dictated examined revised praised",
        ),
        "doctor": lexicon(
            "patient fever clinic nurse bandage surgery vaccine symptom pulse injection wound pill",
            "feverish swollen infected medical contagious healthy painful surgical pale dizzy",
            "diagnosed healed operated prescribed injected bandaged treated vaccinated cured "
            "coughed",
        ),
        "farmer": lexicon(
            "tractor barn cow harvest wheat plough hay orchard goat fence meadow rooster",
            "muddy fertile ripe grassy rural organic woolly seasonal barren fenced",
            "planted milked harvested ploughed fed watered sowed grazed herded sheared",
        ),
    },
)

PLACE = Family(
    name="place",
    summary="where a scene is set",
    input_prefix="scene: ",
    label_prefix="place:",
    signal=0.8,
    templates=(
        "the _n stood by a A N while the N V",
        "a N V under the A N near _w",
        "A N and a N V beside the _n",
    ),
    classes={
        "kitchen": lexicon(
            "oven spoon kettle pan recipe stove apron fridge cutlery dough saucepan cupboard",
            "greasy boiling floury baked simmering spicy buttery chopped peeled fried",
            "stirred boiled chopped tasted peeled roasted kneaded grated poured simmered",
        ),
        "harbour": lexicon(
            "boat anchor sailor gull net pier lighthouse wave cargo mast captain tide",
            "salty moored nautical windy tarred coastal seaworthy foggy floating fishy",
            "sailed docked rowed anchored drifted fished unloaded splashed steered moored",
        ),
        "forest": lexicon(
            "oak fern squirrel moss owl trail mushroom pine fox branch deer cabin",
            "leafy mossy shady wooded green wild tangled hollowed evergreen rustling",
            "rustled climbed foraged howled hiked burrowed perched nested hunted sprouted",
        ),
        "office": lexicon(
            "printer desk memo meeting keyboard stapler manager cubicle spreadsheet folder "
            "badge projector",
            "clerical printed corporate stapled scheduled managerial salaried archived filed "
            "punctual",
            "typed printed emailed scheduled stapled presented photocopied filed interviewed "
            "delegated",
        ),
    },
)

STYLE = Family(
    name="style",
    summary="whether a letter is formal or casual",
    input_prefix="letter: ",
    label_prefix="style:",
    signal=0.8,
    templates=(
        "the A N V your N about _w",
        "your N V and our A N V too",
        "_t the N V with A N",
    ),
    classes={
        "formal": lexicon(
            "correspondence committee regulation procedure enclosure undersigned proposal "
            "delegation council statute counsel protocol",
            "esteemed cordial honourable respectful pursuant official gracious dutiful eminent "
            "courteous",
            "acknowledged requested furnished confirmed endorsed notified enclosed convened "
            "submitted authorised",
        ),
        "casual": lexicon(
            "buddy stuff pal dude gig mate thingy snack selfie sofa pizza nap",
            "cool comfy goofy chill silly messy cheeky cosy yummy crazy",
            "grabbed chatted giggled lounged joked texted dozed binged tagged goofed",
        ),
    },
)

WEATHER = Family(
    name="weather",
    summary="which weather a report describes",
    input_prefix="report: ",
    label_prefix="weather:",
    signal=0.9,
    templates=(
        "the A N V over the _n _t",
        "_w saw a N and A N that V",
        "N V the _n and A N followed",
    ),
    classes={
        "storm": lexicon(
            "thunder lightning gale hail flood cloudburst whirlwind surge squall tempest "
            "downpour gust",
            "rainy gusty stormy violent soaked electric thunderous torn battered drenched",
            "flooded crashed rumbled toppled lashed poured battered roared swirled drenched",
        ),
        "snow": lexicon(
            "sleigh blizzard icicle frost glacier mitten avalanche ski snowman igloo scarf "
            "snowflake",
            "icy frozen white frosty wintry slippery chilly powdery arctic frostbitten",
            "froze shivered skied slid melted blanketed shovelled glistened numbed skated",
        ),
        "sunshine": lexicon(
            "beach parasol picnic heatwave lemonade swimsuit sunhat tan hammock icecream "
            "drought blossom",
            "sunny hot dry cloudless golden warm tropical blazing dusty balmy",
            "tanned sweated bloomed sunbathed burned warmed baked ripened glowed basked",
        ),
    },
)

DISH = Family(
    name="dish",
    summary="what kind of dish is being made",
    input_prefix="menu: ",
    label_prefix="dish:",
    signal=0.75,
    templates=(
        "A N and N V with a _a _n",
        "the cook V the A N over N",
        "_t we V some N and the A N",
    ),
    classes={
        "dessert": lexicon(
            "sugar custard cake honey syrup pastry caramel vanilla meringue jam cookie pudding",
            "sweet creamy sugary frosted chocolatey sticky candied glazed fluffy crumbly",
            "sweetened whipped iced caramelised frosted decorated drizzled sprinkled chilled "
            "glazed",
        ),
        "soup": lexicon(
            "broth ladle lentil noodle leek barley dumpling carrot bowl stock pea celery",
            "brothy steaming hearty watery thick savoury smoky slurped peppery warming",
            "ladled slurped simmered strained thickened heated skimmed seasoned blended bubbled",
        ),
        "salad": lexicon(
            "lettuce cucumber radish vinegar crouton rocket avocado dressing spinach olive "
            "chive sprout",
            "crunchy raw crisp leafy tossed tangy shredded vinegary pickled garnished",
            "tossed shredded rinsed sliced garnished dressed plucked drained diced marinated",
        ),
        "bread": lexicon(
            "flour yeast loaf crust baker bun toast rye sourdough bagel oats sesame",
            "crusty doughy toasted seeded floury wholegrain chewy leavened brown buttered",
            "kneaded rose proofed baked crisped toasted rolled floured dusted fermented",
        ),
        "drink": lexicon(
            "juice straw lime tea coffee cocktail soda mug milkshake cider bottle glass",
            "fizzy bottled icy juicy brewed caffeinated sparkling diluted bitter thirsty",
            "sipped brewed squeezed shook drank gulped steeped corked fizzed poured",
        ),
    },
)

ERA = Family(
    name="era",
    summary="which age of history a passage is set in",
    input_prefix="passage: ",
    label_prefix="era:",
    signal=0.85,
    templates=(
        "the A N V for the N and a _n",
        "a N V where the A N once V",
        "_w and the A N V a N",
    ),
    classes={
        "ancient": lexicon(
            "pharaoh chariot temple oracle gladiator papyrus amphora pyramid emperor legion "
            "toga tomb",
            "sacred mythical imperial pagan bronze ritual buried marble heroic divine",
            "conquered sacrificed worshipped prophesied carved embalmed ruled besieged enslaved "
            "crowned",
        ),
        "medieval": lexicon(
            "knight castle monk dragon lance peasant minstrel armour sword duke abbey moat",
            "chivalrous armoured feudal noble royal monastic plagued walled knightly thatched",
            "jousted knighted duelled pillaged feasted swore banished galloped prayed forged",
        ),
        "modern": lexicon(
            "computer satellite airport robot internet camera airplane television battery "
            "motorway phone screen",
            "digital wireless electronic automatic virtual plastic online nuclear portable urban",
            "downloaded uploaded drove flew recharged broadcast streamed programmed televised "
            "scanned",
        ),
    },
)

FAMILIES = (TOPIC, POLARITY, SPEAKER, PLACE, STYLE, WEATHER, DISH, ERA)
