"""Word lists of the held-out families: for ABFT, evaluation and studies, never for a base's labels.

Each class has three lists, of nouns, adjectives and verbs, in that order. All lists are ours.
"""

from __future__ import annotations

from abft_mlx.data.generated._family import Family, lexicon

INTENT = Family(
    name="intent",
    summary="what a customer's message wants",
    input_prefix="message: ",
    label_prefix="intent:",
    signal=0.8,
    templates=(
        "hello my N V and the A N V _t",
        "the A N you V has a N",
        "your N V my A N near the _n",
    ),
    classes={
        "complaint": lexicon(
            "refund damage delay fault crack leak mistake scratch overcharge stain noise dispute",
            "broken faulty late rude wrong missing unusable defective dented unacceptable "
            "filthy torn",
            "broke leaked refused ignored cheated snapped overcharged malfunctioned cracked "
            "scratched",
        ),
        "order": lexicon(
            "quantity delivery parcel catalogue size colour address checkout basket voucher "
            "stock pair",
            "available spare additional medium express cheap wholesale blue custom reserved "
            "extra boxed",
            "ordered bought reserved shipped purchased subscribed booked selected added restocked",
        ),
        "praise": lexicon(
            "kindness thanks service compliment quality smile courtesy bargain gift favourite "
            "care bonus",
            "wonderful friendly helpful perfect excellent polite prompt reliable generous "
            "grateful splendid speedy",
            "thanked loved recommended enjoyed appreciated admired exceeded smiled rescued "
            "surprised",
        ),
    },
)

EMOTION = Family(
    name="emotion",
    summary="what the writer of a diary entry feels",
    input_prefix="diary: ",
    label_prefix="feeling:",
    signal=0.8,
    templates=(
        "today the A N V me and the N V",
        "I V at the _n with A N and N",
        "a N V when _w saw the A N",
    ),
    classes={
        "anger": lexicon(
            "quarrel insults rage bully argument betrayal tantrum fist grudge outrage injustice "
            "temper",
            "furious hostile bitterly resentful insolent unfair spiteful enraged aggressive "
            "jealous",
            "shouted slammed yelled fumed accused provoked snarled cursed argued glared",
        ),
        "joy": lexicon(
            "party laughter birthday hug balloon holiday reunion dance present celebration "
            "rainbow kitten",
            "cheerful happy merry playful festive sunlit giddy delighted radiant carefree",
            "laughed danced hugged celebrated cheered grinned won giggled beamed skipped",
        ),
        "fear": lexicon(
            "ghost nightmare shadow monster scream spider darkness cliff stranger alarm "
            "intruder knife",
            "creepy scary haunted dark trembling ghostly dangerous eerie nervous frightened",
            "screamed trembled hid fled panicked crept lurked gasped cowered chased",
        ),
        "sorrow": lexicon(
            "funeral tear goodbye grave loss loneliness coffin orphan ruin regret farewell widow",
            "lonely gloomy tearful heartbroken mournful grey weary forlorn hopeless homesick",
            "wept mourned sobbed cried grieved sighed died buried missed lost",
        ),
    },
)

QUESTION = Family(
    name="question",
    summary="what kind of answer a question asks for",
    input_prefix="question: ",
    label_prefix="answer:",
    signal=0.85,
    templates=(
        "tell me about the A N that V the N",
        "is it known if the N V the A _n _t",
        "could the A N of the N have V",
    ),
    classes={
        "person": lexicon(
            "inventor author president painter actor queen hero leader founder novelist "
            "explorer poet",
            "famous married elected talented bearded exiled retired celebrated female anonymous",
            "invented wrote painted married led starred assassinated founded elected portrayed",
        ),
        "number": lexicon(
            "population percentage temperature dozen weight height total average speed distance "
            "age ratio",
            "numeric double annual average maximum daily approximate statistical decimal countless",
            "counted weighed totalled doubled averaged increased multiplied added estimated "
            "numbered",
        ),
        "location": lexicon(
            "country river capital mountain border island continent desert region province "
            "valley ocean",
            "northern southern eastern remote coastal foreign mountainous inland neighbouring "
            "western",
            "bordered flowed stretched located crossed surrounded settled reached migrated "
            "situated",
        ),
        "reason": lexicon(
            "cause effect purpose motive origin explanation consequence influence result factor "
            "meaning logic",
            "causal necessary logical plausible underlying decisive intended inevitable "
            "puzzling mysterious",
            "caused explained triggered resulted prevented justified motivated happened "
            "affected provoked",
        ),
    },
)

URGENCY = Family(
    name="urgency",
    summary="how soon a ticket must be dealt with",
    input_prefix="ticket: ",
    label_prefix="priority:",
    signal=0.75,
    templates=(
        "the A N V on the _n _t",
        "_w wrote that a N V the A N",
        "please look at the N which V a A N",
    ),
    classes={
        "urgent": lexicon(
            "outage emergency deadline breach smoke crisis siren hazard fire shutdown "
            "evacuation virus",
            "critical immediate severe unstable overheated dire failing hacked blocked desperate",
            "crashed exploded failed stopped burned halted vanished sparked escalated corrupted",
        ),
        "routine": lexicon(
            "newsletter update checklist reminder wallpaper inventory cleaning font handbook "
            "lunch poster survey",
            "weekly usual minor tidy optional cosmetic ordinary gradual leisurely standard",
            "tidied renamed dusted arranged reviewed sorted refreshed polished relabelled browsed",
        ),
    },
)

SUBJECTIVITY = Family(
    name="subjectivity",
    summary="whether a statement is an opinion or a fact",
    input_prefix="statement: ",
    label_prefix="kind:",
    signal=0.75,
    templates=(
        "the A N V that the _n was A",
        "a N V the A N in the _n",
        "for _w the N V a A N",
    ),
    classes={
        "opinion": lexicon(
            "belief taste feeling preference impression hunch attitude guess prejudice view "
            "doubt instinct",
            "overrated beautiful terrible ugly boastful adorable pointless fabulous ridiculous "
            "arguably",
            "believed felt preferred hoped disliked supposed imagined guessed suspected wished",
        ),
        "fact": lexicon(
            "record document statistic census date evidence law chapter graph archive dataset "
            "formula",
            "verified historical documented proven measurable legal numerical registered "
            "published dated",
            "documented stated published registered proved listed reported certified contained "
            "signed",
        ),
    },
)

PURPOSE = Family(
    name="purpose",
    summary="whether a post gives advice, warns or invites",
    input_prefix="post: ",
    label_prefix="purpose:",
    signal=0.8,
    templates=(
        "everyone who V the A N has a N",
        "the N V so a A N is here _t",
        "_w V a N and the A _n V",
    ),
    classes={
        "advice": lexicon(
            "tip method habit guide trick exercise routines plan diet technique skill goals",
            "useful practical sensible effective beginner healthful steady patient simple "
            "gradually",
            "practised improved organised learned suggested tried helped planned rested balanced",
        ),
        "warning": lexicon(
            "scam poison danger risk thief trap toxin accident pitfall fraud predator landslide",
            "toxic risky fake deadly unsafe fraudulent slick poisonous hazardous expired",
            "poisoned stole deceived injured trapped drowned infected fooled hacked bitten",
        ),
        "invitation": lexicon(
            "barbecue wedding picnics festival guest venue dinner parade workshop carnival "
            "ticket banquet",
            "welcome free open festooned musical annual communal candlelit outdoor hosted",
            "hosted attended gathered joined toasted invited feasted mingled assembled welcomed",
        ),
    },
)

FAMILIES = (INTENT, EMOTION, QUESTION, URGENCY, SUBJECTIVITY, PURPOSE)
