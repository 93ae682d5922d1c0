"""The sentences of the sample task "intents": what a user wants, with our own labels.

Each block is an intent. Lines with a `*` are only in the test split, so that a model must recognize
the label in new wordings. Some intents are close on purpose: a late card, a late transfer and a late
parcel; a fee, a rate and missing cash; an alarm, a reminder and an appointment.
"""

from typing import NamedTuple


class Intent(NamedTuple):
    """One label, its sentences for both splits, and its sentences for the test split only."""

    label: str
    templates: tuple[str, ...]
    test_templates: tuple[str, ...]


_TABLE = """
card.block
  {oops} my {plastic} [has vanished|is nowhere to be found|slipped out of my {bag}], so nobody should be able to pay with it
  [pickpockets|some kids|two men] in {city} [ran off with|emptied] my {bag}, [make|so make] the {plastic} useless [right away|before they shop with it]
  put a stop on my {plastic} [until i find it again|because i think it was copied|, i left it in a cab in {city}]
  [somebody|a waiter] [wrote down|photographed] my {plastic} number, [disable it|shut it off] [for now|at once]
  the {plastic} is gone since {city}, [kill it|deactivate it] before [it gets misused|money goes missing]
  * {oops} i believe my {plastic} is in strange hands, please make it stop working
  * i threw my {plastic} away by accident, so turn it off for good
card.order
  my {plastic} [snapped in two|has a crack|is worn out], [print|make] me [a fresh one|another]
  [could my {kin} have|i want one more for my {kin}, so give us] a {plastic} [of her own|on the same account]
  [where do i apply for|sign me up for] a {plastic} [with my new surname|with a picture of {city} on it]
  the chip on the {plastic} [is dead|broke off], [so i need|time for] a replacement
  i would love a second {plastic} [to keep at home|for trips to {city}|for the office]
  * it's about time i got a {plastic} that is not scratched
  * do you also hand out {plastic}s for my {kin}, and how is one requested
card.late
  {ages} and the {plastic} you promised is [still not in my letterbox|nowhere to be seen]
  [did you forget|are you ever going] to mail my {plastic}? [i applied {ages} ago|the postman has nothing]
  [my neighbours got theirs|my {kin} got hers] [days ago|weeks ago], yet my own {plastic} is still not in the post
  the {plastic} should have reached {city} by now, [is it lost in the mail|please track it]
  [checking in on|following up on] the {plastic} that [never made it to|should be on its way to] {city}
  * my letterbox in {city} stays empty, shouldn't the {plastic} be here by now
  * still paying with coins because the {plastic} hasn't reached me
card.limit
  the till [said|told me] i'd gone over what my {plastic} allows, [let me spend more|lift that]
  [bump|push] the [ceiling|maximum] on my {plastic} [up to {sum}|before i fly to {city}]
  i am buying {goods} for {sum}, so my {plastic} must [allow|let through] a bigger amount
  my {kin} spends too much, [set|bring down] her {plastic} to {sum} a week
  [what amount|how big a bill] will my {plastic} let through in one day in {city}
  * allow no more than {sum} per week on the {plastic} of my {kin}
  * is {sum} in a single go too much for my {plastic}
cash.missing
  the [dispenser|hole in the wall] in {city} [counted|paid] out [{sum} too little|nothing at all], still my account shrank
  i asked the machine for {sum} and [half of it|one note] never came out
  no notes came out in {city}, [yet|and still] {sum} [went off|left] my account
  [the drawer jammed|the screen went black] while i was drawing {sum}, and [the notes stayed inside|i got nothing]
  i'm short by {sum} because the dispenser in {city} [miscounted|shut too early]
  * your machine in {city} owes me notes, it only handed over part of the {sum}
  * booked as {sum}, but the machine never let go of the notes
send.money
  [pass|get] {sum} over to my {kin} [for the {goods}|before friday|in {city}]
  i owe my {kin} {sum} [for the {goods}|from our trip to {city}], settle it for me
  let my {kin} in {city} have {sum} from my savings
  [pay my share|split the bill] of {sum} with my {kin}
  [shift|put] {sum} from my account to [the one of my {kin}|my {kin}'s bank in {city}]
  * my {kin} in {city} needs {sum} to get home, make it reach her
  * give {sum} from my account to the people who sold me the {goods}
send.late
  the {sum} for my {kin} [left here|went off] {ages} ago but [she has nothing|her bank in {city} sees nothing]
  [my {kin} keeps asking|the seller of the {goods} asks] where the {sum} i wired [is|got stuck]
  {ages} and the {sum} i sent to {city} [isn't there|hasn't landed]
  [how come|strange,] my {kin} hasn't got the {sum} [i paid her|from me] {ages} ago
  * wired {sum} to {city}, my {kin} still stares at an empty account
  * should {sum} really need {ages} to reach my {kin}
send.undo
  {oops} the {sum} went to [the wrong {kin}|some stranger in {city}], [bring it back|pull it back]
  i typed [a zero too many|the wrong name], so take back the {sum} for my {kin}
  [call off|halt] the {sum} that is [on its way to|leaving for] {city}
  my {kin} no longer needs the {sum}, [don't let it go out|keep it here]
  the {goods} [were a fake|never existed], so [get back|recall] the {sum} i wired
  * please don't pay out the {sum} to my {kin} after all
  * the {sum} i just wired was meant for someone else
fee.why
  you took {sum} [on top|more than agreed] when i bought {goods} in {city}, what for
  [the price tag said|it cost] {sum}, yet you booked [somewhat more|a bit on top]
  what is this [handling|service] [cost|line] of {sum} [on my sheet|after drawing notes in {city}]
  i thought [paying|drawing notes] in {city} was free, [where does the {sum} come from|but {sum} is gone]
  [explain|justify] the [little extras|surcharge] you added to the {goods}
  * nobody said that buying {goods} in {city} comes with a surcharge
  * on top of the {goods} there are {sum} that you keep for yourselves
rate.ask
  how many [crowns|forints] would i get for {sum} [in {city}|right now]
  [is today a good day|should i wait] to turn {sum} into [forints|crowns|rand]
  what were my {sum} worth when i bought {goods} in {city}
  [is your rate better than|do you beat] the one at the booth in {city}
  if i swap {sum} here, what comes out in [rand|forints]
  * i travel to {city} and wonder what {sum} are over there
  * compare today's [rand|forints] to last month's
flight.book
  get [me|my {kin} and me] [on|onto] {airline} to {city} [before friday|for the wedding]
  [any|are there] [seats|places] left with {airline} [heading for|bound for] {city}, i'll take two
  i must be in {city} by monday, [the cheapest seat in the air|{airline} if you can]
  [sort out|arrange] my [journey|trip] by air to {city} with {airline}
  two of us, one way, [leaving for|to] {city} by air
  * my {kin} gets married in {city}, put me on some plane there
  * {airline}, aisle, one way to {city}, go ahead
flight.change
  something came up, i have to fly to {city} [a day later|with {airline} instead|in the evening instead]
  [my {kin} is ill|the congress was moved], so [rebook|shift] the {city} seat [to the week after|for sunday]
  [can {airline} put me on|i'd rather take] the later plane to {city}
  the {city} flight is in my {kin}'s name by mistake, [rewrite it|put mine on it]
  make it {city} and not [rome|perth] on my {airline} ticket
  * instead of the morning, i'd rather fly to {city} at night with the ticket i have
  * my seat with {airline} is for friday but i can only go on sunday
flight.status
  has {airline} from {city} [touched down|landed] yet
  [is the plane|are they] from {city} [on schedule|in the air]? my {kin} is on it
  which gate does {airline} to {city} [go from|use]
  i'm picking up my {kin}, [when will|does] {airline} from {city} [land on time|touch down]
  the board shows nothing for {city}, is {airline} still going
  * should i hurry to the airport, or is {airline} to {city} running behind
  * my {kin} sits in {airline}, where is it right now
hotel.book
  we [spend|are spending] easter in {city} and need [somewhere|a cosy place] to sleep
  [two beds|one bed] and breakfast in {city}, not over {sum}
  i don't want to sleep in the car in {city}, [get me|arrange] a room
  [my {kin} visits {city}|my {kin} and i see {city}], reserve somewhere with a pool
  * for the congress in {city} i want a place with breakfast, four nights
  * where could my {kin} sleep in {city} for {sum}, take whatever is free
bag.lost
  the belt in {city} stopped and my {bag} [never showed|wasn't on it]
  {airline} [left|forgot] my {bag} in {city}, [and now what|all my clothes are inside]
  somebody [walked off with|grabbed] my {bag} from the belt, [mine has a red ribbon|what should i fill in]
  i flew with {airline}, [my {bag} didn't|but the {bag} stayed in {city}]
  * everyone from {city} went home with their things, only mine are missing
  * trace my {bag}, it was checked in with {airline}
light.set
  [dim|brighten] the {spot} [a little|to half|, we watch a film]
  make it [bright|dark] in the {spot} [so i can read|, the baby sleeps]
  [nobody is in|everyone left] the {spot}, the bulbs needn't burn
  i [stumble|see nothing] in the {spot}, [do something|a bit brighter]
  [give the {spot}|change the {spot} to] a warm yellow glow
  * it's gloomy in the {spot}
  * candle mood in the {spot}, please
heat.set
  [my toes are ice|we all shiver] in the {spot}
  [two degrees more|not over nineteen] in the {spot}[| tonight| while we're out]
  nobody [sleeps|works] in the {spot} [this week|now], so save some gas there
  i [sweat|melt] in the {spot}, make it cooler
  get the {spot} cosy before my {kin} comes home from {city}
  * twenty-one in the {spot} by six
  * i sit in the {spot} with two sweaters on
fix.call
  water [drips|runs] from the {gadget}, [get someone over|find a handyman]
  the {gadget} [smokes|rattles|smells burnt], who can [look at it|come by]
  i pressed everything on the {gadget}, [it stays dead|nothing moves], send [a man with tools|someone]
  my {kin} [dropped|flooded] the {gadget}, is it worth mending
  is the {gadget} from {city} still under guarantee? it [hums|rattles]
  * sparks came out of the {gadget}, someone must see to it
  * since the move to {city} the {gadget} doesn't do a thing
song.play
  fill the {spot} with {tunes}
  my {kin} loves {tunes}, [let it roll|surprise her]
  [something calm|{tunes}] [to fall asleep|while i cook|for the drive to {city}]
  [i could dance|we're dancing] tonight, {tunes} in the {spot}
  that hit from {city} about the {goods}, [let it run|from the start]
  * the {spot} is too silent, {tunes} would be nice
  * we want to sing along to {tunes}
song.name
  [who on earth|which voice] is singing [there|in the {spot}]
  [how is it called|what's the title], the piece they play in the {spot}
  that melody was in a film about {city}, [identify it|which is it]
  [are these|is that] {tunes} or something else
  which record is this line about {city} from
  * i keep humming this, what might it be called
  * whose voice is coming from the {spot}
sound.set
  i can hardly [follow|understand] the {gadget}, [a notch more|crank it]
  [hush|not so noisy], my {kin} is asleep in the {spot}
  [half as loud|mute it] in the {spot}, [the phone rings|i'm on a call]
  the neighbours bang on the wall because of the {tunes}
  from three to seven on the {gadget} in the {spot}
  * the {tunes} can hardly be heard over the {gadget}
  * my {kin} covers her ears in the {spot}
alarm.set
  [i mustn't oversleep|get me out of bed], {airline} leaves at dawn
  [be noisy|make noise] at quarter to {clock}, i [sleep deeply|hate mornings]
  [out of bed|up] at {clock} [on weekdays|for the trip to {city}], with {tunes}
  let me nap till {clock}, then [shake me|be loud]
  * i want to be awake by {clock}, {city} is far
  * {tunes} as soon as it's {clock}, so that i get up
note.set
  [i tend to forget|keep in mind for me] [the flowers for my {kin}|the {goods}], nudge me at {clock}
  when i'm back from {city}, [nudge me about|bring up] the {goods}
  [ping|poke] me [around|at] {clock} so that i water the plants in the {spot}
  don't let me leave without the {goods} for my {kin}
  at {clock} say that i have to [feed the cat|fetch my {kin}]
  * i'd hate to miss my {kin}'s jubilee, give me a hint the day before
  * the {goods} must be taken back by friday, nudge me
event.add
  [my {kin} and i meet|i see my {kin}] in {city} at {clock}, [note that down in my agenda|block it]
  [block|keep free] the evening of the {clock} talk [in {city}|with my {kin}]
  new entry in my agenda, {clock}, {goods} with my {kin}
  we agreed on {clock} in the {spot}, [save the date|enter that]
  * {clock} in {city} with my {kin}, in the agenda please
  * make room in my week for {tunes} with my {kin} at {clock}
event.move
  my {kin} can't make it at {clock}, [find a later slot|a day later then]
  [shift|push] what i have at {clock} [by an hour|to the week after]
  the talk in {city} [clashes|collides] with my {kin}'s visit, [let it start at {clock}|find it a new slot]
  i'm stuck in {city}, so my {clock} has to wait until sunday
  * {clock} doesn't suit my {kin} any more, take the slot after
  * could what we agreed on in {city} start at {clock} and not so early
table.book
  we're [six|nine] and hungry in {city} at {clock}, [seat us|somewhere by the window]
  [my {kin} turns forty|we celebrate], a nice corner for {clock} at a [bistro|tavern]
  is the [bistro|tavern] in {city} full at {clock}, or can [we|four of us] sit down
  [keep|hold] two places at the [bistro|tavern] for {clock}
  * the tavern in {city}, {clock}, just my {kin} and me
  * we'd like to eat out in {city}, four chairs, quiet corner
food.bring
  [too tired to cook|the fridge is bare], have [something hot|{meal}] brought to the {spot}
  [two times|one] {meal}, [no onions|extra hot], to my door in {city}
  my {kin} craves {meal}, [how fast can it be at our door|have some brought over]
  {meal} [as takeaway|to go] at {clock}
  * we're hungry and in the {spot}, {meal} to our door by {clock}
  * a rider with {meal} would save the evening
recipe.ask
  my {kin} gave me [three pounds of|some] {raw}, [what could it become|any ideas]
  how does my {kin} get her {meal} so [crisp|tender]
  [do i need|is it right to put] {raw} in {meal}
  how long does {meal} with {raw} stay on the stove
  i never made {meal} before, walk me through
  * {raw}, flour and no clue how {meal} is done
  * what goes first into the pan for {meal}
parcel.late
  {ages} since i paid for the {goods}, and [the courier hasn't rung|nothing reached {city}]
  the courier [swore|wrote] he dropped the {goods} [in {city}|at my {kin}'s], [but there's nothing|not true]
  [track|chase] the {goods} i bought from {city}
  my {kin}'s gift, {goods}, should be here by now, [hurry|where did the courier go]
  * the {goods} have been on a lorry from {city} for {ages}
  * was the courier lost, or when do the {goods} get here
item.back
  the {goods} [pinch|smell odd|fell apart], [take them back|i won't keep them]
  my {kin} already has {goods}, so [collect them again|how do i hand them in]
  [wrong shade|far too small], the {goods} from {city}, [i want mine swapped|another size]
  i regret buying the {goods}, [come and get them|where's the label for the courier]
  * the {goods} look nothing like the picture, they go back to {city}
  * not my size, these {goods}, so what now
doctor.see
  [i can't swallow|my {part} throbs] since {city}, [who can examine me|squeeze me in]
  [the pills don't help|it's getting worse], i want somebody to look at my {part}
  is [a physician|dr hale] in {city} free at {clock} [for my {kin}|to check my {part}]
  my {kin} [fell|limps], [get her seen|who's on duty] in {city}
  * someone with a stethoscope should have a look at my {kin}
  * my {part} needs an expert in {city}, first slot you have
pill.ask
  [with food or without|on an empty stomach or not], these {pills}
  [does|do] the {pills} [go with|clash with] a glass of {tipple}
  my {kin} swallowed [two|three] {pills} at once, is that bad
  i skipped the {pills} at {clock}, [take double|carry on] now
  are {pills} [safe|too strong] for my {kin}
  * how far apart must i take the {pills}
  * {tipple} and {pills} on the same evening, good idea or not
sky.ask
  will [we need boots|my {kin} get soaked] in {city} [at {clock}|on sunday]
  can i hang the washing out [in {city}|at {clock}]
  [is a barbecue|are sandals] a good idea in {city} on sunday
  [dark clouds|thunder] over {city}, [how long|is it coming here]
  * should my {kin} pack gloves for {city}
  * the roads to {city}, will they be icy at {clock}
"""

# Slot values: those before the bar are in both splits, those after it only in the test split.
_VALUES = {
    "oops": "oh dear,; damn,; listen,; bad luck:; / oops,; help,",
    "plastic": "card; debit card; bank card; credit card / plastic; payment card",
    "bag": "bag; purse; suitcase; backpack / trolley; handbag",
    "city": "Lisbon; Oslo; Velby; Tavren; Madrid; Marsk; Ashby; Prague; Boston; Cairo / Vienna; Lorne; Quito",
    "kin": "mother; sister; aunt; daughter; niece; flatmate; boss; neighbour / wife; cousin; landlady",
    "ages": "ten days; two weeks; a month; nine days / three weeks; a fortnight",
    "sum": "40 euros; 75 pounds; 300 dollars; 20 euros; 150 pounds; 900 euros / 60 dollars; 1200 pounds",
    "goods": "shoes; headphones; curtains; skis; boots; tyres; glasses / sandals; candles; binoculars",
    "airline": "Nordair; the morning plane; flight 204; Skylark / flight 77; Bluewing",
    "spot": "kitchen; hall; nursery; study; attic; bathroom / cellar; guest room",
    "gadget": "dishwasher; oven; radio; boiler; fridge / dryer; television",
    "tunes": "jazz; old rock; the Night Owls; piano music; sea songs / blues; brass bands",
    "clock": "six; half past seven; nine; noon; ten to eight / five; quarter past ten",
    "meal": "curry; pizza; dumplings; lentil soup; pancakes / noodles; roast chicken",
    "raw": "leeks; mushrooms; plums; beans; rhubarb / pumpkin; spinach",
    "part": "knee; ear; back; wrist; eye / shoulder; throat",
    "pills": "tablets; painkillers; drops; capsules / antibiotics; lozenges",
    "tipple": "wine; beer; milk / cider; grapefruit juice",
    "preface": "back from {city} now.; sorry to write so late.; my {kin} told me to ask you.; i'm at work.; "
    "hope you're well.; we just ate {meal}.; {tunes} is playing, so i'll type.; i am new here. / "
    "the {gadget} broke today, but something else:; busy day in {city}.",
    "coda": "cheers; ta; if you can; that's all; asap; i'm in a rush / much obliged; whenever you can",
}  # fmt: skip


def _values(part: int) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(value.strip() for value in values.split("/")[part].split(";") if value.strip())
        for name, values in _VALUES.items()
    }


VALUES = _values(0)
TEST_VALUES = _values(1)


def _intents() -> tuple[Intent, ...]:
    blocks: dict[str, tuple[list[str], list[str]]] = {}
    label = ""
    for line in _TABLE.strip().splitlines():
        if not line.startswith(" "):
            label = line
            blocks[label] = ([], [])
        else:
            text = line.strip()
            blocks[label][text.startswith("*")].append(text.removeprefix("* "))
    return tuple(Intent(label, tuple(a), tuple(b)) for label, (a, b) in blocks.items())


INTENTS = _intents()
