"""Short texts of several domains, for what must be measured on more than one text.

A number from one text may be that text's own. Claims are tested on the mean over these, and a head
that is idle in prose may be at work in code, so every text has a domain. They were written for
eyechart and are about as long as one another, so that none outweighs the rest.

They come in three sets that share nothing, so that no choice is judged by the texts it was made on:
on TEXTS something is named or fitted, on HELD_OUT it is tried, and on UNSEEN what was chosen on
HELD_OUT is measured once more.
"""

TEXTS: dict[str, str] = {
    "narrative": (
        "Marta had promised herself not to look back, but at the bend of the road she stopped. "
        "The house was smaller than she remembered. Someone had painted the shutters green, and a "
        "child's bicycle leaned against the wall where her father used to mend his nets. She "
        "thought of knocking. Instead she sat on the low stone wall, took off her shoes and shook "
        "out the sand, one shoe after the other, as slowly as she could. When the door opened at "
        "last, it was not a stranger who came out but her own sister, holding a watering can and "
        "looking as if she had expected her for years."
    ),
    "news": (
        "The regional council voted on Tuesday to close the old swing bridge to cars from next "
        "spring, ending a dispute that has lasted nearly nine years. Engineers found cracks in two "
        "of the six main girders last autumn, and repairs would cost more than a new crossing. "
        "Shopkeepers on the east bank said they feared losing customers, while cycling groups "
        "welcomed the decision. Buses will be diverted through the tunnel until a replacement "
        "opens. A spokeswoman for the council said the contract would be put out to tender in June "
        "and that work should take about thirty months."
    ),
    "letter": (
        "Dear Mr Holloway,\n\nThank you for sending the clock back to us so carefully packed. Our "
        "workshop has opened the case and found that the mainspring is sound, but one tooth of the "
        "second wheel is broken, which explains why it loses an hour every night. We can cut a new "
        "wheel for eighty pounds, or fit a used one for thirty. Either way you would have the "
        "clock again before the end of the month. Please let me know which you prefer, and whether "
        "we should polish the face while we are at it.\n\nYours sincerely,\nAgnes Pettibone"
    ),
    "encyclopaedia": (
        "Basalt is a dark, fine-grained volcanic rock that forms when lava rich in iron and "
        "magnesium cools quickly at or near the surface. It makes up most of the floor of the "
        "oceans and large plateaus on land. Because it shrinks as it cools, thick flows often "
        "crack into columns with five or six sides. Its main minerals are plagioclase and "
        "pyroxene, sometimes with olivine, which gives fresh samples a greenish tint. Weathered "
        "basalt breaks down into fertile clay soils. The rock is quarried for road stone, paving "
        "and insulation, and similar lavas cover the dark plains of the Moon."
    ),
    "python": (
        "from collections import defaultdict\n\n\n"
        "def group_by_length(words, minimum=1):\n"
        '    """Map each word length to the sorted words of that length."""\n'
        "    groups = defaultdict(set)\n"
        "    for word in words:\n"
        "        cleaned = word.strip().lower()\n"
        "        if len(cleaned) >= minimum:\n"
        "            groups[len(cleaned)].add(cleaned)\n"
        "    return {length: sorted(found) for length, found in groups.items()}\n\n\n"
        'print(group_by_length(["oak", "elm", "maple"]))\n'
    ),
    "query": (
        "SELECT c.name, c.city, COUNT(o.id) AS orders, SUM(o.total) AS spent\n"
        "FROM customers AS c\n"
        "LEFT JOIN orders AS o ON o.customer_id = c.id AND o.cancelled = 0\n"
        "WHERE c.country IN ('NL', 'BE', 'LU')\n"
        "GROUP BY c.id, c.name, c.city\n"
        "HAVING COUNT(o.id) > 3\n"
        "ORDER BY spent DESC, c.name;\n"
    ),
    "proof": (
        "Claim: the sum of the first n odd numbers is n^2. Proof by induction. For n = 1 the sum "
        "is 1 = 1^2. Suppose that 1 + 3 + ... + (2n - 1) = n^2 for some n. Adding the next odd "
        "number, 2n + 1, to both sides gives 1 + 3 + ... + (2n + 1) = n^2 + 2n + 1 = (n + 1)^2, "
        "which is the claim for n + 1. Hence it holds for all n."
    ),
    "equations": (
        "Let $f(x) = x^3 - 6x^2 + 9x + 2$. Then $f'(x) = 3x^2 - 12x + 9 = 3(x - 1)(x - 3)$, so the "
        "critical points are $x = 1$ and $x = 3$. The function has a local maximum $f(1) = 6$ and "
        "a local minimum $f(3) = 2$."
    ),
    "recipe": (
        "Lentil soup for four\n\n"
        "- 250 g brown lentils\n"
        "- 2 carrots, diced\n"
        "- 1 large onion, chopped\n"
        "- 3 tablespoons olive oil\n"
        "- 1 teaspoon cumin\n"
        "- 1.5 litres water\n\n"
        "1. Fry the onion in the oil until it is golden.\n"
        "2. Add the carrots and the cumin and stir for two minutes.\n"
        "3. Pour in the water, add the lentils and bring to the boil.\n"
        "4. Simmer for 35 minutes, then season with salt and lemon.\n"
    ),
    "dialogue": (
        '"Is this seat taken?"\n'
        '"It was, but I think he got off at Crewe."\n'
        '"Then I shall sit down. Do you mind if I open the window?"\n'
        '"Not at all. Are you going far?"\n'
        '"To the end of the line. My brother keeps bees there."\n'
        '"Bees! I was stung once, as a boy. I have been afraid of them ever since."\n'
        '"He says they know who is afraid."\n'
        '"And do you believe him?"\n'
        '"About bees, always. About money, never."\n'
    ),
    "german": (
        "Am Rand des Dorfes steht eine alte Mühle, deren Rad sich seit vielen Jahren nicht mehr "
        "dreht. Im Sommer kommen Kinder aus der Stadt und suchen am Bach nach bunten Steinen. Der "
        "letzte Müller wohnt noch immer im Haus daneben. Wenn man ihn fragt, erzählt er gern, wie "
        "laut es früher war und wie still die Nächte heute sind."
    ),
    "french": (
        "Chaque matin, avant l'ouverture du marché, la vieille libraire pose trois livres sur une "
        "chaise devant sa porte. Personne ne sait comment elle les choisit. Un jour de pluie, un "
        "garçon lui a demandé s'il pouvait en prendre un sans payer. Elle a souri, puis elle a "
        "répondu que la chaise était faite pour cela."
    ),
}
"""Name to text, for naming or fitting something; 105 to 130 tokens each for the default model's
tokenizer."""

HELD_OUT: dict[str, str] = {
    "travel": (
        "We reached the ferry slip just after six, with the tide already turning and the gulls "
        "quarrelling over somebody's lunch. Nobody sells tickets here; you pay the mate once the "
        "ramp is up, in coins if you have them. The crossing lasts forty minutes and smells of "
        "diesel and wet rope. Halfway across, the hills behind the harbour vanish into haze, and "
        "for a while there is no land anywhere. Bring a scarf, whatever the forecast claims, and "
        "stand on the port side: that is where the seals come up to stare."
    ),
    "obituary": (
        "Ambrose Tidwick, head gardener at Wendle Hall for thirty-eight years, has died at the "
        "age of ninety-one. Born above a bakery, he liked to say that he knew flour before "
        "flowers. He replanted the walled garden after the great frost, raised a white foxglove "
        "that still bears his wife's name, and trained more than sixty apprentices, most of whom "
        "he taught to sharpen a spade before they were allowed to dig with it. He disliked roses "
        "and admitted it only in retirement. Two daughters survive him."
    ),
    "manual": (
        "Before using the dehumidifier for the first time, let it stand upright for at least four "
        "hours. Place it on a level floor, away from curtains, with a hand's width of free space "
        "on every side. Slide the tank in until it clicks; the motor will not start otherwise. "
        "Turn the dial to the humidity you want, and wait for the green lamp. If the lamp blinks "
        "red, the tank is full or badly seated. Rinse the filter under lukewarm water every "
        "fortnight and never run the machine without it."
    ),
    "essay": (
        "Waiting has a poor reputation. We speak of killing time in queues, as though an idle "
        "quarter of an hour were a pest to be put down. Yet much of what I know about my "
        "neighbours I learned while standing behind them, and most of my better ideas arrived "
        "when nothing else was due. Someone who never waits is never ambushed by a thought. "
        "Perhaps impatience is less a love of action than a fear of company, above all of the "
        "company we keep when the battery is flat and the train is late."
    ),
    "javascript": (
        "// Call `task` at most once per `delay` milliseconds.\n"
        "export function throttle(task, delay = 200) {\n"
        "  let timer = null;\n"
        "  let latest;\n\n"
        "  return function (...args) {\n"
        "    latest = args;\n"
        "    if (timer !== null) return;\n"
        "    timer = setTimeout(() => {\n"
        "      timer = null;\n"
        "      task.apply(this, latest);\n"
        "    }, delay);\n"
        "  };\n"
        "}\n\n"
        "window.addEventListener('scroll', throttle(updateHeader));\n"
    ),
    "shell": (
        "#!/bin/sh\n"
        "# Keep the seven newest backups of a folder.\n"
        "set -eu\n"
        "source=${1:?usage: $0 FOLDER}\n"
        'target="$HOME/backups"\n\n'
        'mkdir -p "$target"\n'
        'tar -czf "$target/$(date +%F).tar.gz" "$source"\n'
        'ls -t "$target" | tail -n +8 | while read -r old; do\n'
        '    echo "removing $old"\n'
        '    rm -- "$target/$old"\n'
        "done\n"
    ),
    "problem": (
        "A cistern is filled by two pipes. The wide pipe alone needs 6 hours, the narrow one "
        "alone 10 hours. Both are opened at noon, but the wide pipe is shut after 3 hours. When "
        "is the cistern full?\n\n"
        "Solution. In 3 hours the wide pipe fills 3/6 = 1/2 of the cistern. The narrow pipe must "
        "supply the other half, at a rate of 1/10 per hour, which takes 5 hours. So it is full "
        "at 5 in the afternoon."
    ),
    "geometry": (
        "Inscribe a triangle ABC in a circle with centre O, in such a way that AB is a diameter. "
        "Draw the radius OC. Since OA = OC, triangle AOC is isosceles, so its base angles at A "
        "and C are equal; call them α. In the same way the angles of BOC at B and C are equal; "
        "call them β. The angles of ABC add up to 180°, that is, α + β + (α + β) = 180°. "
        "Therefore α + β = 90°, and the angle at C is right."
    ),
    "agenda": (
        "ALLOTMENT SOCIETY: SPRING MEETING\n"
        "Saturday 14 March, church hall\n\n"
        "09:30  Coffee and seed exchange\n"
        "10:00  Minutes of the autumn meeting\n"
        "10:10  Treasurer's report (Ines)\n"
        "10:25  Broken tap on plot 17\n"
        "10:40  Vote: may we keep hens?\n"
        "11:15  Rota for the compost heaps\n"
        "11:30  Any other business\n"
        "12:00  Soup\n"
    ),
    "interview": (
        "INTERVIEWER: You have tuned pianos for half a century. Does anything still surprise "
        "you?\n\n"
        "TUNER: What people drop into them. Last week, a wedding ring and eleven pencils.\n\n"
        "INTERVIEWER: (laughing) And did you return the ring?\n\n"
        "TUNER: Of course. The lady was delighted. Her husband, I thought, a little less so.\n\n"
        "INTERVIEWER: Which key goes flat first?\n\n"
        "TUNER: Whichever one the children like. I can tell you their favourite tune before they "
        "play a note.\n"
    ),
    "spanish": (
        "Cuando se fue la luz, los vecinos salieron al balcón con velas y linternas. Alguien sacó "
        "una guitarra, y la señora del tercero, que nunca saludaba a nadie, empezó a repartir "
        "trozos de tortilla. Hablamos hasta muy tarde, sin vernos bien las caras. A las dos "
        "volvió la corriente y todos apagamos las lámparas otra vez."
    ),
    "italian": (
        "Gentili condomini, da lunedì l'ascensore resterà fermo per circa dieci giorni, perché "
        "bisogna sostituire i cavi. Chi ha difficoltà a salire le scale può rivolgersi al "
        "portiere, che porterà la spesa fino al piano. Vi preghiamo inoltre di non lasciare "
        "biciclette nell'atrio. Ci scusiamo per il disagio."
    ),
}
"""Name to text, for proofs: nothing was named or fitted on these, and each domain has as many as in
TEXTS; 106 to 125 tokens each for the default model's tokenizer."""

UNSEEN: dict[str, str] = {
    "diary": (
        "11 August. Rain again, the ninth day of it. The tents no longer dry overnight and Piet "
        "has given up shaving. Towards noon the cloud lifted long enough for us to count the "
        "storks on the far bank: forty-three, of which six carry rings. We lost one of the two "
        "good telescopes when the canoe tipped, and with it, I fear, my temper. Apologised at "
        "supper. Afterwards we lay awake listening to the frogs, and agreed that, whatever the "
        "report may say in the end, this marsh must not be drained."
    ),
    "c": (
        "#include <stddef.h>\n\n"
        "/* Length of the longest run of equal samples. */\n"
        "size_t longest_run(const int *samples, size_t count)\n"
        "{\n"
        "\tsize_t best = 0, run = 0;\n\n"
        "\tfor (size_t i = 0; i < count; i++) {\n"
        "\t\trun = (i > 0 && samples[i] == samples[i - 1]) ? run + 1 : 1;\n"
        "\t\tif (run > best)\n"
        "\t\t\tbest = run;\n"
        "\t}\n"
        "\treturn best;\n"
        "}\n"
    ),
    "probability": (
        "An urn contains four red and six blue marbles. Two are drawn at random, without "
        "replacement. What is the chance that their colours differ? There are 10 · 9 / 2 = 45 "
        "equally likely pairs, and 4 · 6 = 24 of them mix the colours, so the probability is "
        "24/45 = 8/15. As a check, both are red in 6 pairs and both blue in 15, and indeed "
        "6 + 15 + 24 = 45."
    ),
    "glossary": (
        "Words used on board\n\n"
        "aft: towards the back of the vessel\n"
        "ballast: weight carried low to keep her steady\n"
        "cleat: a fitting to which a line is made fast\n"
        "draught: how deep the hull sits in the water\n"
        "galley: the kitchen\n"
        "halyard: a rope that hoists a sail or flag\n"
        "keel: the spine beneath the hull\n"
        "leeward: away from the wind\n"
        "reef: to make a sail smaller\n"
        "windlass: a winch for the anchor\n"
    ),
    "chat": (
        "[18:02] noor: has anyone seen the key to the rehearsal room??\n"
        "[18:03] tobias: not on the hook?\n"
        "[18:03] noor: would i be asking\n"
        "[18:05] wilma: Sorry, it's in my coat. I'm on the tram, back in ten.\n"
        "[18:06] tobias: we could practise in the stairwell, nice echo\n"
        "[18:06] noor: with a drum kit?\n"
        "[18:07] tobias: quietly\n"
    ),
    "portuguese": (
        "Na farmácia da praça vive um gato cinzento que só se deixa tocar por quem está doente. A "
        "dona, que herdou a loja de uma tia, jura que nunca o ensinou. Quando alguém finge uma "
        "tosse para lhe fazer festas, ele salta do balcão e vai dormir para cima da balança, até "
        "que o impostor se vá embora."
    ),
}
"""Name to text, for measuring once more what was chosen on HELD_OUT: one of each domain; 108 to 134
tokens each for the default model's tokenizer."""

DOMAINS: dict[str, str] = {
    "narrative": "prose",
    "news": "prose",
    "letter": "prose",
    "encyclopaedia": "prose",
    "python": "code",
    "query": "code",
    "proof": "mathematics",
    "equations": "mathematics",
    "recipe": "list",
    "dialogue": "dialogue",
    "german": "other language",
    "french": "other language",
    "travel": "prose",
    "obituary": "prose",
    "manual": "prose",
    "essay": "prose",
    "javascript": "code",
    "shell": "code",
    "problem": "mathematics",
    "geometry": "mathematics",
    "agenda": "list",
    "interview": "dialogue",
    "spanish": "other language",
    "italian": "other language",
    "diary": "prose",
    "c": "code",
    "probability": "mathematics",
    "glossary": "list",
    "chat": "dialogue",
    "portuguese": "other language",
}
"""Name to domain, for the texts of all three sets."""
