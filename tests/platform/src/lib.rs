//! Integration tests of the whole gateway in network namespaces, one program for each subject in `tests/`.
