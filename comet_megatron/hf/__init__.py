"""CoMeT in plain torch and transformers: the definition that every other part of the package is compared with."""
