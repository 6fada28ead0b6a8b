// SPDX-License-Identifier: MIT OR Apache-2.0
//! Values that messages carry as text, in the form that users type.

/// Such a type has `#[serde(try_from = "String", into = "String")]`: the text is what it is parsed from and shown as.
macro_rules! as_text {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = $crate::Failure;

            fn try_from(text: String) -> Result<Self, $crate::Failure> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}
pub(crate) use as_text;
