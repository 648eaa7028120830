"""What clients may send, as strict pydantic models: types only; ranges are checked by `SamplingParams`."""
