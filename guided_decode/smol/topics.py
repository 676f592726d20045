"""What the prompts are about: everyday things, pleasant, plain and unpleasant.

The splits share no topic, so that a figure on held-out prompts says nothing of what was learnt by
heart.
"""

from typing import Literal, get_args

Split = Literal["training", "validation", "held-out"]

_TRAINING = """
a rainy Monday morning; a flat tyre; an old bicycle; the smell of fresh bread; a broken umbrella;
a long queue at the bank; a birthday party; a lost wallet; a new pair of shoes; a noisy neighbour;
the first day of school; a cold cup of coffee; a walk on the beach; a missed train; a stray cat;
a letter from a friend; a power cut; an empty fridge; a garden in spring; a visit to the dentist;
a football match; a slow computer; a train journey; a burnt dinner; a family photograph;
a job interview; a leaking roof; a Sunday market; a sleepless night; a school play;
a traffic jam; a lazy afternoon; a cracked phone screen; a wedding cake; a wet dog;
a parking ticket; a library book; a summer storm; a late bus; a warm blanket;
a bad haircut; a piano lesson; a muddy field; a lost key; a picnic in the park;
a toothache; a new colleague; a camping trip; an unpaid bill; a street musician;
a cancelled flight; a bowl of soup; a dusty attic; a crying baby; a swimming pool;
a barking dog; a mountain hike; a dead battery; a kind stranger; a crowded lift;
a chess game; a spilled drink; a morning run; a boring meeting; a box of chocolates;
a winter coat; a wrong number; a village fair; a car accident; a rocking chair;
a snowy road; a grandmother's recipe; a stolen bicycle; a city at night; a fever;
a fishing trip; a hospital corridor; a paper aeroplane; an argument with a friend; a hot bath;
a broken window; a rose bush; a long staircase; a failed exam; a holiday postcard;
an apple pie; a spider in the kitchen; a moving van; a ferry crossing; a lonely evening;
a puppy; a rusty gate; a thank-you note; a sore back; a kite in the wind;
a spoiled carton of milk; a new neighbour; a phone call at night; a concert ticket; a dark alley;
a tea kettle; a garden fence; a headache; a game of cards; a forest path;
a lost suitcase; a country inn; a crumpled shirt; a school bus; a broken promise;
a jar of honey; a leaky tap; a sports day; an old film; a heat wave;
a basket of laundry; a tax form; a bridge at dawn; a nosebleed; a toy train;
a sick goldfish; a farm in autumn; a ringing alarm clock; a museum guide; a cup of cocoa;
a pile of dishes; a hotel room; a sunburn; a reunion; a wooden boat;
an unanswered message; a bus driver; a black cloud; a candle; a pair of glasses;
a nightmare; a pumpkin; a street corner; a hard pillow; a good joke;
a roof garden; a mosquito; a village doctor; a torn map; a shared umbrella
"""

_VALIDATION = """
a wasp at lunch; a new kitchen; a borrowed pen; a night shift; a broken zip;
a rainbow; a blocked sink; a dance class; a neighbour's goat; a lost ring;
a foggy harbour; a surprise visit; a stubbed toe; a bakery window; a quiet library;
a garage sale; a long goodbye; a thunderstorm; a tomato plant; a crowded bus;
a late parcel; a skating rink; a dull lecture; a cough; a friendly dog
"""

_HELD_OUT = """
a delayed train; a sunny balcony; a broken chair; a first snowfall; a lost passport;
a vegetable garden; a rude waiter; a music festival; a stiff neck; a country road;
a new baby; a cold shower; a bus stop; a stained carpet; an evening by the fire;
a dented car; a cheese sandwich; a hike in the rain; a swarm of ants; a childhood friend;
a dentist's bill; a lighthouse; a bad cold; a rowing boat; a noisy fridge;
a bunch of flowers; a missed birthday; a ticket inspector; a lake in winter; a broken heel;
a secondhand bookshop; a power drill; a stomach ache; a choir practice; a flooded cellar;
a plate of pancakes; a wrong turn; a barber's shop; a starry sky; a burglary;
a box of old letters; a squeaky door; a pottery class; a bee sting; a Saturday breakfast;
a lost cat; a new scarf; a rejected application; a tram ride; a windy hill;
a cracked mug; a puppet show; a tired nurse; an orchard; a locked door;
a birthday card; a dusty road; a jellyfish; a farewell party; a torn jacket;
a radio programme; a sandcastle; a landlord; a rabbit in the snow; a queue at the airport;
a wooden spoon; a migraine; a tandem ride; an overgrown path; a bowl of cherries;
a failed cake; a night train; a street lamp; a sprained ankle; a lemonade stand
"""

TOPICS: dict[Split, tuple[str, ...]] = {
    split: tuple(" ".join(text.split()).split("; "))
    for split, text in zip(get_args(Split), (_TRAINING, _VALIDATION, _HELD_OUT), strict=True)
}


def topics(split: Split) -> tuple[str, ...]:
    """The topics of a split. Raises ValueError for one that there is not."""
    if split not in TOPICS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(TOPICS)}")
    return TOPICS[split]
