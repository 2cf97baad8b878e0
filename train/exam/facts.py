"""Lists that anybody can check: what belongs to them, and other spellings of it."""

from __future__ import annotations

FACTS: dict[str, tuple[str, ...]] = {
    "planets of the Solar System": ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"),
    "months of the year": (
        *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
        *("November", "December"),
    ),
    "days of the week": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "seasons of the year": ("spring", "summer", "autumn|fall", "winter"),
    "noble gases that occur in nature": ("helium|He", "neon|Ne", "argon|Ar", "krypton|Kr", "xenon|Xe", "radon|Rn"),
    "seven continents": (
        *("Africa", "Antarctica", "Asia", "Europe", "North America", "South America"),
        "Australia|Oceania|Australia/Oceania",
    ),
    "five oceans": (
        *("Atlantic|Atlantic Ocean", "Pacific|Pacific Ocean", "Indian|Indian Ocean", "Arctic|Arctic Ocean"),
        "Southern|Southern Ocean|Antarctic|Antarctic Ocean",
    ),
    "Great Lakes of North America": (
        *("Superior|Lake Superior", "Michigan|Lake Michigan", "Huron|Lake Huron", "Erie|Lake Erie"),
        "Ontario|Lake Ontario",
    ),
    "prime numbers below 10": ("2|two", "3|three", "5|five", "7|seven"),
    "kinds of chess pieces": (
        *("king|kings", "queen|queens", "rook|castle|rooks|castles", "bishop|bishops", "knight|knights"),
        "pawn|pawns",
    ),
    "suits of French playing cards": ("hearts|heart", "diamonds|diamond", "clubs|club", "spades|spade"),
    "cardinal directions": ("north|N", "east|E", "south|S", "west|W"),
}
"""Each list with its items. `|` separates the spellings of an item."""
