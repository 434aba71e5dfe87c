"""Whether the model still says what it said: a fixed set of texts, compared before and after."""
