"""What the demo's model reads: passages, and questions that share few words with the passage that answers them."""

# title -> passage
PASSAGES = {
    "bread": """Flour, water, salt and a little yeast are all a baker needs. While the mixture rests in a warm place, the
        yeast feeds on sugars in the flour and gives off carbon dioxide, and the gluten, stretched by kneading, holds the
        gas in thousands of small pockets. After an hour or two the loaf has doubled. In the oven the pockets swell once
        more before the crumb sets, steam escapes, and the crust browns as amino acids and sugars react on its surface.
        A sourdough works alike, but its wild yeasts share the work with bacteria, whose acids give the sharp taste.""",
    "glaciers": """Snow that survives the summer is buried under the snow of the next winter. Under decades of weight the
        flakes are pressed into grains, the grains into ice, and once the ice is some tens of metres thick it begins to
        flow downhill under its own mass, slowly, a metre or less on most days. On its way it plucks rocks from its bed
        and grinds valleys into the shape of a U. Where it reaches warmer air it melts as fast as it arrives, and leaves
        at its snout a ridge of rubble, the moraine, by which geologists can tell how far it once reached.""",
    "octopus": """An octopus has three hearts and no bones. Two of the hearts push blood through the gills, the third
        through the rest of the body. Most of its neurons are not in the brain but in the eight arms, which can taste
        what they touch and solve small problems by themselves. Its skin holds cells with sacs of pigment that muscles
        pull open and shut, so that within a second the animal can look like sand, coral or a poisonous neighbour. In
        aquariums they have unscrewed jars, squirted at lamps that annoyed them, and crept at night to the next tank.""",
    "compilers": """A program as people write it means nothing to a processor. The translator first splits the text into
        words, then builds a tree that shows what belongs to what, and checks that the kinds of values fit. The tree is
        lowered to a simpler language, in which many passes remove work: constants are folded, repeated expressions are
        computed once, loops are unrolled or merged so that data stays in registers. At the end instructions are chosen
        for one machine and put in an order that keeps its units busy, and the result is written as an object file.""",
    "tea": """Black, green and white tea come from one shrub, Camellia sinensis; what differs is what happens after the
        leaves are picked. For green tea they are heated at once, in a pan or with steam, which stops the enzymes that
        would darken them. For black tea they are rolled until their cells break and left for hours in moist air, and
        turn copper brown. A cup made with boiling water draws out bitter tannins from green leaves, so that people in
        Japan let the kettle cool to seventy degrees; black leaves want it hotter. A minute too long spoils either.""",
    "tides": """Twice a day the sea climbs the harbour wall and falls again. The moon pulls more strongly on the water on
        the near side of the earth than on the planet's centre, and less on the far side, so that the ocean is drawn out
        into two bulges, under which the continents turn. The sun does the same at about half the strength. When both
        stand in a line, at new and full moon, their effects add and the range is large; at the quarters they work
        against each other. The shape of coasts does the rest: in the Bay of Fundy the range passes fifteen metres.""",
    "chess": """The opening is about space and development: knights and bishops leave the back rank, a pawn or two holds
        the centre, and the king is brought into safety behind a wall of pawns. In the middlegame players look for
        weaknesses that can not be defended twice, for forks, pins and discovered attacks, and count exchanges to the
        end before they begin them. When few pieces are left the king becomes a fighter, and a single passed pawn that
        reaches the last rank decides. Strong players calculate less than one thinks: they recognise patterns.""",
    "vaccines": """The body remembers an infection: among its white cells some live on for years that know the surface of
        the invader, and on a second visit they multiply within days. An injection of weakened or killed germs, or only
        of a harmless piece of one, teaches the same lesson without the disease. In the newest kind the piece is not
        made in a factory at all; a strand of messenger RNA carries the recipe, and cells of the arm make it for a few
        days, until the strand decays. Where enough people are protected the germ finds nobody to pass it on.""",
    "bridges": """A beam across a stream bends, and the longer it is the more of its strength it spends on carrying itself.
        An arch turns the load into pressure that runs down into the ground at both ends, which suits stone. For the
        widest straits the deck hangs from steel cables slung over two towers, and the cables pull at great blocks of
        concrete on the shores. Wind is the danger there: in 1940 a slender roadway near Tacoma began to twist in a
        breeze and tore itself apart, and since then models of every long span are tested in a tunnel.""",
    "jazz": """Around 1900, in the dance halls of New Orleans, brass bands, church songs and the blues met the rhythms of
        ragtime. A group agreed on a tune and its chords, and over them each musician in turn made up a melody on the
        spot, answered by the others. From there it went to Chicago and New York, grew to big orchestras that played for
        dancers, and in the forties shrank again to five people in a cellar who played faster than anybody could dance.
        What stayed is the swing: notes a little late or long against a beat that the listener feels and nobody plays.""",
    "bicycles": """A rider who does not steer falls. Leaning to one side, the front wheel turns by itself a little to the
        same side, partly because its point of contact trails behind the steering axis, and the curve that follows
        brings the wheels back under the weight. Engineers have built machines without gyroscopic effect and without
        trail that still stay upright when rolling alone, so that no single cause explains it. The frame itself, two
        triangles of thin tubes, has hardly changed since 1890, and carries ten times its own mass.""",
    "stars": """A cloud of cold gas, disturbed perhaps by an explosion nearby, begins to fall into itself. Its middle grows
        hot, and when it passes ten million degrees the nuclei of hydrogen meet hard enough to join into helium. The
        light of that fusion holds up the layers above for as long as the fuel lasts: some million years for a heavy
        one, which burns blue and ends with a bang, ten thousand million for one like ours, which will swell to a red
        giant, shed its hull, and leave an ember of the size of the earth that cools for ever.""",
}

# question -> title of the passage that answers it
QUESTIONS = {
    "Why does dough get bigger before it is baked?": "bread",
    "Which sea animal changes its colour to hide?": "octopus",
    "Why does the water level at the beach go up and down every day?": "tides",
    "How does source code become something that a computer can run?": "compilers",
}


def texts() -> list[str]:
    """All passages, then all questions."""
    return [" ".join(passage.split()) for passage in PASSAGES.values()] + list(QUESTIONS)
