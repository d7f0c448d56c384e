//! The index of `IceCache`: trees whose leaves are pages of keys and values.
