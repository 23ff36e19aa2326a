"""`dslc study`: configurations of one spec, trained with several seeds, and compared."""
