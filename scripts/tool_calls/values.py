"""The values that requests are made of.

Open sets are long, so that the seed can hold some values out of training.
"""

from __future__ import annotations


def _entries(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


LABELS = _entries("""
    pasta, laundry, pizza, tea, workout, nap, homework, bread, rice, parking, yoga, roast, cake, soup, coffee,
    bath, potatoes, meditation, reading, cookies, lasagna, stretching, dishwasher, presentation, chess, puzzle,
    gardening, barbecue, drying, steak, sauna, painting, piano, quiz, plank, sourdough, broccoli, ironing, oven,
    dumplings, compost, essay, spelling test, hair dye, face mask, jigsaw, risotto, oatmeal, lamb, pancakes,
    salmon, curry, noodles, waffles, washing machine, sprinkler, debate, violin practice, tent, varnish, glue,
    photo shoot, warm-up, cooldown, push-ups, sunbathing, inhaler, ice pack, phone call, board game, marinade,
    meringue, brownies, muffins, quiche, stew, porridge, dough, popcorn, jelly, spaghetti, ravioli, pudding,
    gravy, omelette, burgers, kebab, chowder, sorbet, granola, squats, sprint, jogging, rowing, cycling, boxing,
    swimming, ballet, karate, rehearsal, lecture, exam, interview, standup, brainstorming, dictation, algebra,
    geometry, crossword, scrabble, sudoku, checkers, knitting, crochet, weeding, mulching, watering, vacuuming,
    mopping, dusting, polishing, sanding, plaster, concrete, primer, charger, update, backup, download,
    defrosting, dryer, kettle, toaster, grill, humidifier, incubator, meter, ferry, shift, curfew, recess,
    intermission, halftime, break, prayer, silence
""")
CITIES = _entries("""
    Oslo, Lisbon, Madrid, Vienna, Dublin, Athens, Prague, Warsaw, Berlin, Rome, Paris, London, Boston, Chicago,
    Denver, Seattle, Toronto, Montreal, Sydney, Perth, Tokyo, Osaka, Seoul, Beijing, Delhi, Mumbai, Cairo,
    Nairobi, Lagos, Tunis, Lima, Bogota, Santiago, Helsinki, Stockholm, Copenhagen, Zurich, Geneva, Milan,
    Naples, Porto, Seville, Krakow, Budapest, Bristol, New York, San Diego, Buenos Aires, Cape Town, Hong Kong,
    Kuala Lumpur, Rio de Janeiro, Manila, Jakarta, Bangkok, Hanoi, Taipei, Shanghai, Kyoto, Dakar, Accra,
    Casablanca, Marseille, Lyon, Nice, Bordeaux, Hamburg, Munich, Cologne, Leipzig, Salzburg, Basel, Antwerp,
    Ghent, Rotterdam, Utrecht, Gothenburg, Bergen, Riga, Vilnius, Belfast, Glasgow, Leeds, Houston, Dallas,
    Phoenix, Portland, Atlanta, Miami, Havana, Quito, Caracas, Auckland, Brisbane, Las Vegas, San Juan, Santa
    Fe, Mexico City, Tel Aviv, Abu Dhabi, New Orleans, Salt Lake City, Ankara, Izmir, Baku, Tbilisi, Yerevan,
    Tehran, Muscat, Doha, Riyadh, Amman, Beirut, Damascus, Karachi, Lahore, Kabul, Kathmandu, Dhaka, Colombo,
    Chennai, Bangalore, Hyderabad, Kolkata, Pune, Jaipur, Busan, Nagoya, Sapporo, Fukuoka, Wuhan, Chengdu,
    Nanjing, Cebu, Darwin, Hobart, Adelaide, Canberra, Wellington, Suva, Honolulu, Anchorage, Calgary, Ottawa,
    Winnipeg, Halifax, Memphis, Nashville, Orlando, Tampa, Tucson, Omaha, Detroit, Cleveland, Baltimore,
    Richmond, Kingston, Managua, Asuncion, Montevideo, Salvador, Recife, Brasilia, Cusco, Malaga, Valencia,
    Bilbao, Granada, Toulouse, Nantes, Turin, Genoa, Verona, Palermo, Bremen, Dresden, Stuttgart, Graz, Bern,
    Bratislava, Ljubljana, Zagreb, Belgrade, Sofia, Bucharest, Tirana, Minsk, Kyiv, Odessa, Tallinn, Tampere,
    Malmo, Aarhus, Reykjavik, Cardiff, Swansea, Cork, Galway, Limerick, Tangier, Algiers, Kampala, Kigali,
    Lusaka, Harare, Windhoek, Durban, Pretoria
""")
UNITS = ("celsius", "fahrenheit")
NAMES = _entries("""
    Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Isabel, Jack, Karen, Leo, Maria, Noah, Olivia, Paul,
    Rachel, Sam, Tina, Victor, Wendy, Adam, Bella, Carlos, Diana, Erik, Fatima, George, Hannah, Ivan, Julia,
    Kevin, Laura, Martin, Nina, Oscar, Priya, Robert, Sofia, Thomas, Yusuf, Zoe, Alice, Brian, Chloe, Daniel,
    Elena, Frank, Mia, Lucas, Ella, Oliver, Ruth, Peter, Vera, Simon, Agnes, Walter, Ingrid, Hugo, Pablo, Lucia,
    Mateo, Nadia, Omar, Layla, Hassan, Yuki, Kenji, Mei, Arjun, Anita, Ravi, Sven, Astrid, Lars, Greta, Otto,
    Heidi, Marco, Giulia, Pierre, Camille, Antoine, Monica, Rosa, Teresa, Philip, Edward, Charlotte, Amelia,
    Jacob, Mason, Logan, Naomi, Stella, Abigail, Aaron, Bruno, Beatrice, Caleb, Celia, Dominic, Daphne, Elias,
    Eva, Fiona, Fabian, Gordon, Gloria, Harriet, Howard, Irene, Isaac, Jasmine, Joel, Katherine, Kofi, Leonie,
    Liam, Malik, Miriam, Nathan, Nora, Octavia, Owen, Patricia, Quentin, Rebecca, Rupert, Sabrina, Samuel,
    Tabitha, Tobias, Ursula, Vincent, Violet, Wilma, Xavier, Yvonne, Zachary, Aisha, Bilal, Chen, Deepa, Emre,
    Farid, Gabriela, Hiroshi, Ines, Jorge, Kamala, Lena, Manuel, Nikolai, Olga, Pavel, Rania, Stefan, Tariq,
    Usha, Valentina, Wei, Ximena, Yasmin, Zubair, Bernard, Cecilia, Dennis, Esther, Florence, Gregory, Helena,
    Ian, Joanna, Keith, Lydia, Martha, Norman, Oswald, Penelope, Ralph, Sylvia, Theodore, Veronica, Warren
""")
TEXTS = _entries("""
    the meeting is cancelled, I am running late, dinner is ready, the train leaves at noon, our flight was moved
    to Monday, the keys are under the mat, I will call back tonight, the parcel has arrived, we need more
    chairs, the car is broken, nobody is at home, the concert was wonderful, my phone has no battery, the shop
    opens tomorrow, the dog ran away, I found your umbrella, the plumber is here, the report looks good, she
    said yes, the exam went well, we won the match, the bus never came, there is snow on the road, your book is
    on the table, I cannot come on Friday, the baby is asleep, lunch is on me, the printer needs paper, I booked
    two seats, the boss wants an answer, the bridge is closed, he forgot his jacket, we start without you, the
    cake is in the oven, my sister is visiting, the password has changed, they moved to the first floor, I owe
    you ten dollars, the heating works again, the film begins in an hour, all the tickets are gone, the doctor
    can see him today, it was a false alarm, the kids want ice cream, our team has a new coach, the neighbours
    are on holiday, the window is still open, somebody stole my bike, the garden looks lovely, we are waiting
    outside, the new sofa is too big, the lift is out of order, I left early, the deadline is next week, you
    were right about the map, the cat is on the roof, this place is far too loud, the soup needs salt, I saw a
    fox this morning, the water is boiling, grandma sends her love, the invoice is wrong, the choir sings
    tonight, my shoes are wet, the router was replaced, we found a parking space, the judge agreed, the bakery
    sold out, a storm is coming, the painter finished the fence, her plane landed, the library closes at six, I
    passed the driving test, the meeting room is locked, our guests like fish, the batteries are empty, the
    horse won the race, everybody enjoyed the play, the museum is free today, the coffee machine leaks, I need a
    lift to work, the tenants moved out, the soup kitchen needs help, your order was shipped, the tyre is flat,
    he plays the drums, the lecture was boring, they sold the boat, I lost the receipt
""")
ROOMS = _entries("""
    kitchen, bedroom, bathroom, garage, hallway, office, attic, basement, nursery, library, studio, pantry,
    sauna, cellar, lobby, workshop, greenhouse, corridor, classroom, gym, veranda, balcony, cabin, lounge,
    living room, dining room, guest room, laundry room, music room, play room, meeting room, tool shed, den,
    porch, loft, sunroom, terrace, foyer, closet, shed, boathouse, clinic, chapel, gallery, bakery, stable,
    barn, archive, canteen, waiting room, sewing room, conference hall, wine cellar, spare bedroom, boiler room,
    dressing room, parlour, vestibule, mudroom, dormitory, infirmary, laboratory, cloakroom, washroom, scullery,
    larder, conservatory, alcove, annex, atrium, ballroom, bunker, cafeteria, carport, deck, depot, entrance,
    hangar, kennel, landing, mezzanine, nook, orangery, patio, pavilion, penthouse, reception, refectory, salon,
    showroom, stairwell, stockroom, storeroom, suite, theatre, tower, vault, wardrobe, warehouse, yard,
    courtyard, henhouse, treehouse, bunkhouse, gatehouse, summerhouse, hallway closet, drawing room, locker
    room, server room, staff room, dining hall, winter garden, press room, music hall, reading room
""")
ITEMS = _entries("""
    milk, eggs, bread, butter, cheese, apples, bananas, tomatoes, onions, garlic, rice, flour, sugar, salt,
    honey, yoghurt, carrots, spinach, lemons, grapes, nails, screws, paint, tape, rope, candles, batteries,
    plates, napkins, balloons, soap, shampoo, towels, matches, pencils, notebooks, envelopes, stamps, gloves,
    socks, sunscreen, bandages, mushrooms, cucumbers, walnuts, oats, olive oil, orange juice, light bulbs, dog
    food, paper cups, toilet paper, hand cream, peanut butter, lentils, chickpeas, parsley, basil, ginger,
    cinnamon, pepper, mustard, vinegar, ketchup, crackers, biscuits, pretzels, almonds, raisins, plums, pears,
    peaches, cherries, melons, zucchini, cabbage, leeks, celery, beetroot, turnips, salmon, tuna, shrimp,
    sausages, ham, turkey, tofu, noodles, cereal, chocolate, marmalade, cream, ice, cider, bleach, sponges,
    mops, buckets, hammers, screwdrivers, hinges, bolts, wire, sandpaper, varnish, brushes, lanterns, tents,
    ribbons, confetti, crayons, scissors, staples, folders, toothpaste, vitamins, aspirin, thermometers,
    diapers, blankets, pillows, umbrellas, sandals, goggles, garbage bags, baking powder, maple syrup, green
    tea, cat litter, bird seed, sparkling water, rubber gloves, safety pins, extension cords, apricots,
    artichokes, asparagus, avocados, bagels, barley, beans, blueberries, broccoli, cashews, cauliflower, chives,
    chutney, clementines, cocoa, coconuts, coriander, couscous, cranberries, croissants, currants, dates,
    doughnuts, dumplings, eggplants, fennel, figs, grapefruit, hazelnuts, herring, horseradish, hummus, kale,
    kiwis, lasagna, lettuce, limes, lobster, mackerel, mangoes, margarine, mayonnaise, mint, molasses,
    mozzarella, muesli, nectarines, nutmeg, okra, olives, oregano, oysters, pancetta, papayas, paprika,
    parmesan, parsnips, pecans, pineapples, pistachios, popcorn, potatoes, prunes, pumpkins, quinoa, radishes,
    raspberries, rhubarb, rosemary, sage, salami, sardines, seaweed, shallots, sherbet, squash, strawberries,
    syrup, tarragon, thyme, tortillas, trout, truffles, vanilla, watercress, yams, yeast, anchors, axes,
    backpacks, baskets, binoculars, blinds, bowls, brackets, brooms, cables, calendars, carpets, chains, chalk,
    chargers, chisels, clamps, clothespins, combs, compasses, corks, crates, cups, curtains, cushions, drills,
    earplugs, erasers, fans, filters, flashlights, forks, frames, funnels, fuses, gaskets, glue, hats, helmets,
    hooks, hoses, jars, kettles, keyboards, knives, ladders, lamps, lids, lightbulbs, locks, magnets, markers,
    masks, mirrors, mugs, needles, nuts, oars, padlocks, pans, pegs, pins, pipes, pliers, plugs, poles, pots,
    pulleys, razors, rulers, saws, scarves, screens, seeds, shelves, shovels, spades, spatulas, spoons,
    stickers, straps, strings, switches, tacks, tarps, thread, tiles, tissues, toasters, toys, trays, tripods,
    trowels, tubes, valves, vases, washers, wax, whistles, wipes, wrenches, zippers
""")
LISTS = _entries("""
    grocery, hardware, camping, party, pharmacy, holiday, office, birthday, garden, kitchen, picnic, travel,
    school, baby, pet, cleaning, christmas, market, wedding, beach, bakery, festival, moving, hiking, workshop,
    fishing, emergency, recipe, dinner, weekend, summer, winter, studio, craft, sewing, painting, stationery,
    concert, sailing, cycling, gift, breakfast, barbecue, plumbing, charity, reading, vacation, carnival,
    hospital, autumn, spring, laundry, lunch, brunch, supper, errand, dentist, doctor, nursery, balcony,
    bathroom, garage, library, museum, theatre, hotel, cabin, desert, mountain, island, harbour, lake, river,
    skiing, surfing, climbing, running, tennis, football, chess, robot, computer, camera, guitar, orchestra,
    costume, makeup, jewelry, souvenir, donation, recycling, repair, renovation, heating, lighting, aquarium,
    puppy, kitten, pony, farm, orchard, vineyard, greenhouse, toolbox, lunchbox
""")
CURRENCIES = _entries("EUR, USD, GBP, JPY, CHF, CAD, AUD, SEK, NOK, INR, PLN, BRL")
ARTISTS = _entries("""
    Adele, Beyonce, Coldplay, Radiohead, Queen, Genesis, Madonna, Prince, Shakira, Rihanna, Blondie, Muse,
    Oasis, Blur, Pixies, Miles Davis, Nina Simone, Johnny Cash, Billie Holiday, Bob Marley, David Bowie, Kate
    Bush, Pink Floyd, Daft Punk, Taylor Swift, Elton John, Tina Turner, Stevie Wonder, Ray Charles, Joni
    Mitchell, Leonard Cohen, Frank Sinatra, Amy Winehouse, Norah Jones, Patti Smith, Tom Waits, Abba, Metallica,
    Nirvana, Gorillaz, Portishead, Santana, Kraftwerk, Enya, Sade, Drake, Lorde, Bjork, Moby, Eminem, Louis
    Armstrong, Ella Fitzgerald, John Coltrane, Edith Piaf, Neil Young, Janis Joplin, Dolly Parton, Marvin Gaye,
    Aretha Franklin, Jimi Hendrix, Bruce Springsteen, Whitney Houston, Lady Gaga, Ed Sheeran, Talking Heads,
    Arctic Monkeys, Fleetwood Mac, Simply Red, Massive Attack, Aerosmith, Anastacia, Bananarama, Beck, Bonobo,
    Cher, Chopin, Cream, Debussy, Dido, Duffy, Erasure, Eurythmics, Faithless, Feist, Foals, Garbage, Goldfrapp,
    Handel, Haydn, Incubus, Interpol, Jamiroquai, Journey, Kansas, Keane, Liszt, Mahler, Mozart, Morcheeba,
    Nickelback, Orbital, Outkast, Paramore, Placebo, Pulp, Purcell, Rammstein, Ravel, Roxette, Rush, Satie,
    Schubert, Scorpions, Shaggy, Slade, Sparks, Starsailor, Suede, Supertramp, Toto, Travis, Vangelis, Verdi,
    Vivaldi, Wagner, Ween, Yes, Nat King Cole, Count Basie, Duke Ellington, Thelonious Monk, Charlie Parker,
    Herbie Hancock, Diana Krall, Sarah Vaughan, Carole King, Paul Simon, Cat Stevens, Van Morrison, Peter
    Gabriel
""")
TITLES = _entries("""
    budget review, team lunch, book club, movie night, birthday party, project kickoff, job interview, game
    evening, wine tasting, choir practice, board meeting, farewell dinner, garden party, yoga class, design
    workshop, school reunion, bike tour, museum visit, cooking course, photo walk, code review, picnic,
    barbecue, brunch, rehearsal, hike, quiz night, staff training, tennis match, city walk, sales call, science
    fair, poetry reading, blood donation, house viewing, parent evening, karaoke, bowling, street festival,
    charity run, chess tournament, baby shower, garage sale, safety drill, tax meeting, pottery lesson, swim
    training, cheese tasting, language exchange, band practice, volunteer day, dance lesson, theatre trip,
    hackathon, housewarming, retirement party, press conference, strategy session, river cruise, stargazing,
    audition, auction, banquet, baptism, briefing, carnival, celebration, ceremony, checkup, clinic visit,
    concert, contest, debate, demonstration, dinner, discussion, excursion, exhibition, festival, fitting,
    fundraiser, gala, graduation, haircut, inspection, inventory, jam session, lecture, marathon, massage,
    masterclass, mediation, negotiation, opening, parade, planning, presentation, recital, reception, regatta,
    sleepover, symposium, tasting, tournament, tryout, tutorial, vaccination, vernissage, walkthrough, webinar,
    wedding, whale watching, winter market, workout
""")
MONTHS = _entries("January, February, March, April, May, June, July, August, September, October, November, December")
PHRASES = _entries("""
    good morning, thank you very much, where is the station, I am hungry, the soup is cold, see you tomorrow, I
    lost my passport, how are you, I love this city, two coffees please, the bill please, happy birthday, can
    you help me, my name is Alex, good luck, it is raining, I need a doctor, where do you live, the food was
    excellent, what time is it, I do not understand, sleep well, please speak slowly, we are lost, is this seat
    free, have a nice trip, I miss you, turn left at the bridge, no problem, the water is warm, open the window,
    I am allergic to nuts, nice to meet you, call the police, that is too expensive, one ticket to the airport,
    where can I park, I will be back soon, congratulations, the museum is closed, this is my brother, keep the
    change, the train has left, I am very tired, this tastes wonderful, who is there, my shoes hurt, it was a
    pleasure, we need two rooms, the battery is dead, please close the door, I forgot my keys, do you take
    cards, the view is beautiful, I am looking for my son, please wait here, the road is blocked, welcome home,
    I would like some bread, you are very kind, the children are asleep, stop at the corner, my bag was stolen,
    when does it start, the lake is frozen, I like your hat, everything is fine, it does not work, they are my
    parents, we got married yesterday, the shower is cold, a table for four please, he is a good cook, the shop
    closes early
""")
LANGUAGES = _entries(
    "French, German, Spanish, Italian, Portuguese, Dutch, Polish, Swedish, Greek, Turkish, Japanese, Korean"
)
