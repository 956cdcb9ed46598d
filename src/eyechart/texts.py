"""Short texts of several domains, for what must be measured on more than one text.

A number from one text may be that text's own. Claims are tested on the mean over these, and a head
that is idle in prose may be at work in code, so every text has a domain. They were written for
eyechart and are about as long as one another, so that none outweighs the rest.
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
"""Name to text; 90 to 160 tokens each for a tokenizer trained on English."""

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
}
"""Name to domain."""
