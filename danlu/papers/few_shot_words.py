"""Pairs of words for the tasks of `few_shot`: question, answer."""

CAPITALS = """
Austria Vienna, Belgium Brussels, Bulgaria Sofia, Croatia Zagreb, Denmark Copenhagen,
Estonia Tallinn, Finland Helsinki, France Paris, Germany Berlin, Greece Athens, Hungary Budapest,
Ireland Dublin, Italy Rome, Latvia Riga, Lithuania Vilnius, Norway Oslo, Poland Warsaw,
Portugal Lisbon, Romania Bucharest, Russia Moscow, Serbia Belgrade, Spain Madrid, Sweden Stockholm,
Switzerland Bern, Turkey Ankara, Ukraine Kyiv, China Beijing, Japan Tokyo, Thailand Bangkok,
Vietnam Hanoi, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Israel Jerusalem, Jordan Amman,
Lebanon Beirut, Syria Damascus, Egypt Cairo, Libya Tripoli, Algeria Algiers, Morocco Rabat,
Tunisia Tunis, Kenya Nairobi, Uganda Kampala, Ghana Accra, Senegal Dakar, Nigeria Abuja,
Zambia Lusaka, Zimbabwe Harare, Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago,
Ecuador Quito, Venezuela Caracas, Colombia Bogota, Australia Canberra, Nepal Kathmandu, India Delhi,
Pakistan Islamabad
"""
ANTONYMS = """
hot cold, big small, up down, left right, good bad, old new, fast slow, high low, hard soft,
light dark, rich poor, happy sad, early late, open closed, full empty, wet dry, strong weak,
long short, thick thin, wide narrow, deep shallow, clean dirty, easy difficult, near far,
first last, young old, true false, loud quiet, love hate, win lose, buy sell, push pull, day night,
summer winter, east west, north south, black white, brave cowardly, alive dead, awake asleep,
above below, before after, always never, accept refuse, arrive depart, begin end, borrow lend,
build destroy, cheap expensive, give take, inside outside, laugh cry, major minor, more less,
most least, positive negative, remember forget, rise fall, smooth rough, tall short
"""
PLURALS = """
cat cats, dog dogs, box boxes, city cities, baby babies, knife knives, leaf leaves, man men,
woman women, child children, foot feet, tooth teeth, mouse mice, goose geese, person people,
bus buses, church churches, dish dishes, glass glasses, wish wishes, country countries,
story stories, party parties, lady ladies, wife wives, life lives, shelf shelves, wolf wolves,
half halves, potato potatoes, tomato tomatoes, hero heroes, book books, table tables, chair chairs,
house houses, tree trees, river rivers, car cars, road roads, day days, key keys, toy toys,
boy boys, monkey monkeys, fox foxes, bench benches, peach peaches, brush brushes, class classes,
dress dresses, berry berries, penny pennies, fly flies, puppy puppies, loaf loaves, thief thieves,
calf calves, ox oxen, window windows
"""
PAST_TENSES = """
go went, see saw, take took, come came, give gave, find found, think thought, tell told,
become became, leave left, feel felt, bring brought, begin began, keep kept, hold held, write wrote,
stand stood, hear heard, mean meant, meet met, run ran, pay paid, sit sat, speak spoke, lead led,
grow grew, lose lost, fall fell, send sent, build built, break broke, spend spent, drive drove,
buy bought, wear wore, choose chose, teach taught, catch caught, eat ate, drink drank, fly flew,
sing sang, swim swam, throw threw, walk walked, play played, call called, work worked, live lived,
help helped, start started, turn turned, move moved, talk talked, open opened, stop stopped,
carry carried, study studied, plan planned, smile smiled
"""


def pairs(text: str) -> list[tuple[str, str]]:
    return [(question, answer) for question, answer in (part.split() for part in text.split(","))]
