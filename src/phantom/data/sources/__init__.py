"""Where clips come from. A source is a module that writes clips and says what it left out."""
