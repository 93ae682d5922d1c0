"""`ptp merge-info`: everything to know of an adapter before it is deployed or combined, without the base's weights.

`saved` reads an adapter, `base` builds its base without weights, `facts` gathers what is known of one adapter from
`folding`, `costs`, `learned` and `integrity`; `together` holds several against each other.
"""
