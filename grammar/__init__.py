"""The grammar of the policy language, as a package resource."""
