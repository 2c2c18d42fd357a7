"""From a teacher to a cause and a remedy: the existing ablations' arms, asked in an order, with one error rate.

``hypotheses`` says what can be accused, as data; ``judging`` decides from right and wrong answers alone; ``asking`` has
the order of the questions; ``arms`` builds what must be trained. Nothing here trains by itself.
"""
