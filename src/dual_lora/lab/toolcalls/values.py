"""The values that requests are made of.

Open sets are long, so that the seed can hold some values out of training.
"""

from __future__ import annotations


def _entries(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


LABELS = _entries("""
    pasta, laundry, pizza, tea, workout, nap, homework, bread, rice, parking, yoga, roast, cake, soup, coffee, bath,
    potatoes, meditation, reading, cookies, lasagna, stretching, dishwasher, presentation, chess, puzzle, gardening,
    barbecue, drying, steak, sauna, painting, piano, quiz, plank, sourdough, broccoli, ironing
""")
CITIES = _entries("""
    Oslo, Lisbon, Madrid, Vienna, Dublin, Athens, Prague, Warsaw, Berlin, Rome, Paris, London, Boston, Chicago, Denver,
    Seattle, Toronto, Montreal, Sydney, Perth, Tokyo, Osaka, Seoul, Beijing, Delhi, Mumbai, Cairo, Nairobi, Lagos,
    Tunis, Lima, Bogota, Santiago, Helsinki, Stockholm, Copenhagen, Zurich, Geneva, Milan, Naples, Porto, Seville,
    Krakow, Budapest, Bristol, New York, San Diego, Buenos Aires, Cape Town, Hong Kong, Kuala Lumpur, Rio de Janeiro
""")
UNITS = ("celsius", "fahrenheit")
NAMES = _entries("""
    Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Isabel, Jack, Karen, Leo, Maria, Noah, Olivia, Paul, Rachel,
    Sam, Tina, Victor, Wendy, Adam, Bella, Carlos, Diana, Erik, Fatima, George, Hannah, Ivan, Julia, Kevin, Laura,
    Martin, Nina, Oscar, Priya, Robert, Sofia, Thomas, Yusuf, Zoe, Alice, Brian, Chloe, Daniel, Elena, Frank
""")
TEXTS = _entries("""
    the meeting is cancelled, I am running late, dinner is ready, the train leaves at noon, our flight was
    moved to Monday, the keys are under the mat, I will call back tonight, the parcel has arrived, we need
    more chairs, the car is broken, nobody is at home, the concert was wonderful, my phone has no battery,
    the shop opens tomorrow, the dog ran away, I found your umbrella, the plumber is here, the report
    looks good, she said yes, the exam went well, we won the match, the bus never came, there is snow on
    the road, your book is on the table, I cannot come on Friday, the baby is asleep, lunch is on me, the
    printer needs paper, I booked two seats, the boss wants an answer, the bridge is closed, he forgot his
    jacket, we start without you, the cake is in the oven, my sister is visiting, the password has
    changed, they moved to the first floor, I owe you ten dollars, the heating works again, the film
    begins in an hour, all the tickets are gone, the doctor can see him today, it was a false alarm, the
    kids want ice cream, our team has a new coach, the neighbours are on holiday, the window is still
    open, somebody stole my bike, the garden looks lovely, we are waiting outside, the new sofa is too
    big, the lift is out of order, I left early, the deadline is next week, you were right about the map,
    the cat is on the roof, this place is far too loud, the soup needs salt, I saw a fox this morning
""")
ROOMS = _entries("""
    kitchen, bedroom, bathroom, garage, hallway, office, attic, basement, nursery, library, studio, pantry, sauna,
    cellar, lobby, workshop, greenhouse, corridor, classroom, gym, veranda, balcony, cabin, lounge, living room,
    dining room, guest room, laundry room, music room, play room, meeting room, tool shed
""")
ITEMS = _entries("""
    milk, eggs, bread, butter, cheese, apples, bananas, tomatoes, onions, garlic, rice, flour, sugar, salt, honey,
    yoghurt, carrots, spinach, lemons, grapes, nails, screws, paint, tape, rope, candles, batteries, plates, napkins,
    balloons, soap, shampoo, towels, matches, pencils, notebooks, envelopes, stamps, gloves, socks, sunscreen,
    bandages, mushrooms, cucumbers, walnuts, oats, olive oil, orange juice, light bulbs, dog food, paper cups,
    toilet paper, hand cream, peanut butter
""")
LISTS = _entries("""
    grocery, hardware, camping, party, pharmacy, holiday, office, birthday, garden, kitchen, picnic, travel, school,
    baby, pet, cleaning, christmas, market, wedding, beach, bakery, festival, moving, hiking
""")
CURRENCIES = _entries("EUR, USD, GBP, JPY, CHF, CAD, AUD, SEK, NOK, INR, PLN, BRL")
ARTISTS = _entries("""
    Adele, Beyonce, Coldplay, Radiohead, Queen, Genesis, Madonna, Prince, Shakira, Rihanna, Blondie, Muse, Oasis, Blur,
    Pixies, Miles Davis, Nina Simone, Johnny Cash, Billie Holiday, Bob Marley, David Bowie, Kate Bush, Pink Floyd,
    Daft Punk, Taylor Swift, Elton John, Tina Turner, Stevie Wonder, Ray Charles, Joni Mitchell, Leonard Cohen,
    Frank Sinatra, Amy Winehouse, Norah Jones, Patti Smith, Tom Waits
""")
TITLES = _entries("""
    budget review, team lunch, book club, movie night, birthday party, project kickoff, job interview, game evening,
    wine tasting, choir practice, board meeting, farewell dinner, garden party, yoga class, design workshop,
    school reunion, bike tour, museum visit, cooking course, photo walk, code review, picnic, barbecue, brunch,
    rehearsal, hike, quiz night, staff training, tennis match, city walk
""")
MONTHS = _entries("January, February, March, April, May, June, July, August, September, October, November, December")
PHRASES = _entries("""
    good morning, thank you very much, where is the station, I am hungry, the soup is cold, see you tomorrow,
    I lost my passport, how are you, I love this city, two coffees please, the bill please, happy birthday,
    can you help me, my name is Alex, good luck, it is raining, I need a doctor, where do you live,
    the food was excellent, what time is it, I do not understand, sleep well, please speak slowly, we are lost,
    is this seat free, have a nice trip, I miss you, turn left at the bridge, no problem, the water is warm,
    open the window, I am allergic to nuts, nice to meet you, call the police, that is too expensive,
    one ticket to the airport, where can I park, I will be back soon, congratulations, the museum is closed,
    this is my brother, keep the change
""")
LANGUAGES = _entries(
    "French, German, Spanish, Italian, Portuguese, Dutch, Polish, Swedish, Greek, Turkish, Japanese, Korean"
)
