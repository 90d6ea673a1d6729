//! Wire formats: where bytes become fields and fields become bytes. Byte order is crossed here and nowhere else.
//!
//! Each module holds the constants and plain accessors of one header, over slices whose length `parse` has checked.

pub mod checksum;
