"""The values that requests are made of. Open sets are long, so that the seed can hold some of them out of training."""

from __future__ import annotations

LABELS = tuple(
    "pasta laundry pizza tea workout nap homework bread rice parking yoga roast cake soup coffee bath potatoes meditation "
    "reading cookies lasagna stretching dishwasher presentation chess puzzle gardening barbecue drying steak sauna "
    "painting piano quiz plank sourdough broccoli ironing".split()
)
CITIES = (
    *"Oslo Lisbon Madrid Vienna Dublin Athens Prague Warsaw Berlin Rome Paris London Boston Chicago Denver Seattle".split(),
    *"Toronto Montreal Sydney Perth Tokyo Osaka Seoul Beijing Delhi Mumbai Cairo Nairobi Lagos Tunis Lima Bogota".split(),
    *"Santiago Helsinki Stockholm Copenhagen Zurich Geneva Milan Naples Porto Seville Krakow Budapest Bristol".split(),
    *("New York", "San Diego", "Buenos Aires", "Cape Town", "Hong Kong", "Kuala Lumpur", "Rio de Janeiro"),
)
UNITS = ("celsius", "fahrenheit")
NAMES = tuple(
    "Anna Ben Clara David Emma Felix Grace Henry Isabel Jack Karen Leo Maria Noah Olivia Paul Rachel Sam Tina Victor "
    "Wendy Adam Bella Carlos Diana Erik Fatima George Hannah Ivan Julia Kevin Laura Martin Nina Oscar Priya Robert "
    "Sofia Thomas Yusuf Zoe Alice Brian Chloe Daniel Elena Frank".split()
)
SUBJECTS = (
    *(
        "the meeting",
        "the train",
        "the dinner",
        "our flight",
        "the parcel",
        "the concert",
        "my phone",
        "the car",
    ),
    *(
        "the dentist",
        "the new sofa",
        "the game",
        "the report",
        "the shop",
        "the plumber",
        "the bus",
        "the party",
    ),
)
STATEMENTS = (
    *(
        "is late",
        "is cancelled",
        "starts at noon",
        "was moved to Monday",
        "is at the front door",
        "is ready",
        "is broken",
    ),
    *(
        "will be here soon",
        "has been found",
        "is on the way",
        "was great",
        "opens tomorrow",
        "needs more time",
    ),
    *("is waiting outside", "finishes early", "costs too much"),
)
ROOMS = (
    *"kitchen bedroom bathroom garage hallway office attic basement nursery library studio pantry sauna cellar".split(),
    *"lobby workshop greenhouse corridor classroom gym veranda balcony cabin lounge".split(),
    *(
        "living room",
        "dining room",
        "guest room",
        "laundry room",
        "music room",
        "play room",
        "meeting room",
        "tool shed",
    ),
)
ITEMS = (
    *"milk eggs bread butter cheese apples bananas tomatoes onions garlic rice flour sugar salt honey yoghurt carrots".split(),
    *"spinach lemons grapes nails screws paint tape rope candles batteries plates napkins balloons soap shampoo towels".split(),
    *"matches pencils notebooks envelopes stamps gloves socks sunscreen bandages mushrooms cucumbers walnuts oats".split(),
    *(
        "olive oil",
        "orange juice",
        "light bulbs",
        "dog food",
        "paper cups",
        "toilet paper",
        "hand cream",
        "peanut butter",
    ),
)
LISTS = tuple(
    "grocery hardware camping party pharmacy holiday office birthday garden kitchen picnic travel school baby pet "
    "cleaning christmas market wedding beach bakery festival moving hiking".split()
)
CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF", "CAD", "AUD", "SEK", "NOK", "INR", "PLN", "BRL")
ARTISTS = (
    *"Adele Beyonce Coldplay Radiohead Queen Genesis Madonna Prince Shakira Rihanna Blondie Muse Oasis Blur Pixies".split(),
    *(
        "Miles Davis",
        "Nina Simone",
        "Johnny Cash",
        "Billie Holiday",
        "Bob Marley",
        "David Bowie",
        "Kate Bush",
    ),
    *("Pink Floyd", "Daft Punk", "Taylor Swift", "Elton John", "Tina Turner", "Stevie Wonder", "Ray Charles"),
    *(
        "Joni Mitchell",
        "Leonard Cohen",
        "Frank Sinatra",
        "Amy Winehouse",
        "Norah Jones",
        "Patti Smith",
        "Tom Waits",
    ),
)
TITLES = (
    *(
        "budget review",
        "team lunch",
        "book club",
        "movie night",
        "birthday party",
        "project kickoff",
        "job interview",
    ),
    *(
        "game evening",
        "wine tasting",
        "choir practice",
        "board meeting",
        "farewell dinner",
        "garden party",
        "yoga class",
    ),
    *(
        "design workshop",
        "school reunion",
        "bike tour",
        "museum visit",
        "cooking course",
        "photo walk",
        "code review",
    ),
    *(
        "picnic",
        "barbecue",
        "brunch",
        "rehearsal",
        "hike",
        "quiz night",
        "staff training",
        "tennis match",
        "city walk",
    ),
)
MONTHS = tuple(
    "January February March April May June July August September October November December".split(),
)
PHRASES = (
    *(
        "good morning",
        "thank you very much",
        "where is the station",
        "I am hungry",
        "the soup is cold",
        "see you tomorrow",
    ),
    *(
        "I lost my passport",
        "how are you",
        "I love this city",
        "two coffees please",
        "the bill please",
        "happy birthday",
    ),
    *(
        "can you help me",
        "my name is Alex",
        "good luck",
        "it is raining",
        "I need a doctor",
        "where do you live",
    ),
    *(
        "the food was excellent",
        "what time is it",
        "I do not understand",
        "sleep well",
        "please speak slowly",
    ),
    *(
        "we are lost",
        "is this seat free",
        "have a nice trip",
        "I miss you",
        "turn left at the bridge",
        "no problem",
    ),
    *("the water is warm", "open the window", "I am allergic to nuts", "nice to meet you", "call the police"),
    *(
        "that is too expensive",
        "one ticket to the airport",
        "where can I park",
        "I will be back soon",
        "congratulations",
    ),
    *("the museum is closed", "this is my brother", "keep the change"),
)
LANGUAGES = (
    *(
        "French",
        "German",
        "Spanish",
        "Italian",
        "Portuguese",
        "Dutch",
        "Polish",
        "Swedish",
        "Greek",
        "Turkish",
    ),
    *("Japanese", "Korean"),
)
