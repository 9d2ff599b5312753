"""The paper's eight data sets, as ../shared/data and recipes/ name them."""

SETS = (
    "sst2",
    "rotten_tomatoes",
    "financial_phrasebank",
    "sst5",
    "trec",
    "subjective",
    "tweet_eval_emotion",
    "tweet_eval_hate",
)
