"""What lapefast is measured against, written from the published definitions."""
