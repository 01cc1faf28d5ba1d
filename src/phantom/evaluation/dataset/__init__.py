"""`phantom data report`: a page of the prepared clips, and of what conditions on them drop."""
