"""Window planning: pure functions that cut an utterance into exact windows."""
