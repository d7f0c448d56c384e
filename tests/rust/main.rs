//! Properties of the index, checked against slow and obvious models.

mod basics;
