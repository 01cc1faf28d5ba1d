"""A vision-language model as the judge: any set of questions, asked of an OpenAI-compatible endpoint."""
