"""What people of the world write to services, and the answers.

Each row is a topic: its domain, its gist in a few words, the ways to write it, and the answers. The
rows teach the base model the everyday domains.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """One reason to write to a service."""

    domain: str
    gist: str
    messages: tuple[str, ...]
    answers: tuple[str, ...]


TOPICS = (
    # The bank.
    Topic(
        "banking",
        "a card that has not come",
        (
            "{past} you [posted|sent|mailed] me a {cardkind} [and|but] it [hasn't|has not|never] [come|arrived|turned up|been delivered][| yet]",
            "[how long|how many days] [does|will] [a|my|the] {cardkind} take to [come|be delivered|get here|arrive by post]",
            "[where is|what happened to|any news of] [the|my] {cardkind} [i ordered|you posted|i asked for] {past}",
            "[i'm|i am|we are] [waiting for|expecting|still without] [a|my|the] {cardkind}[| since {month}| for {few} weeks]",
        ),
        (
            "a new card takes {few} working days to come by post",
            "your card was posted {past} and should come {when}",
        ),
    ),
    Topic(
        "banking",
        "switching on a new card",
        (
            "the {cardkind} [is here|came|arrived] {past}, [now what|what comes next|does it work right away|must i do something first]",
            "{how} [activate|switch on|start using|turn on|set up] [this|my|a] [new|] {cardkind}",
            "[i can't|the app won't let me|it fails when i try to] activate [it|my {cardkind}|the card that came]",
        ),
        (
            "open the app, choose the card and press activate",
            "your card is active once you enter the last four digits",
        ),
    ),
    Topic(
        "banking",
        "a lost card",
        (
            "[i lost|i have lost|i've misplaced|i left|i can't find|i dropped] my {cardkind} [at|in|near] the {place}[| {past}]",
            "my {cardkind} [is missing|is lost|is gone|disappeared|fell out of my bag] [|and i need a new one|and i am worried]",
            "{ask} [freeze|lock|suspend|cancel] the {cardkind} [i lost|that went missing] {past}",
        ),
        (
            "I have frozen your card and ordered another one",
            "your card is now locked, a new one will come {when}",
        ),
    ),
    Topic(
        "banking",
        "a stolen card",
        (
            "[someone|a thief|a stranger|somebody] [stole|took|grabbed|has got hold of] my {cardkind} [in {town}|at the {place}|{past}]",
            "my [bag|wallet|purse|phone] [was stolen|was robbed|got taken] with [my|the] {cardkind} in it",
            "[they are|somebody is|a thief is] using my {cardkind}, stop [it|them] [now|quickly|at once]",
        ),
        (
            "I have stopped your card, please report the theft to the police",
            "nobody can use the card any more",
        ),
    ),
    Topic(
        "banking",
        "a forgotten PIN",
        (
            "[i forgot|i don't remember|i can't recall] [the|my] [PIN|passcode|password|secret code][| of my {cardkind}| for {appname}]",
            "[the machine|the ATM|the shop|it] says [my|the] [PIN|code] is [blocked|wrong|locked], [how many tries do i have|can it be unlocked|i typed it {number} times]",
            "{want} [change|reset|choose|see] [the|my] [PIN|passcode] [|at an ATM|of the {cardkind}|while abroad|from {appname}]",
        ),
        (
            "you can see your PIN in the app under card settings",
            "you can change your PIN at any cash machine",
        ),
    ),
    Topic(
        "banking",
        "a declined payment",
        (
            "[my|the] {cardkind} was [declined|refused|rejected|turned down] at {merchant}[| {past}]",
            "{why} [my|the|this] {payment} [was|got|has been] [declined|rejected|refused]",
            "[i tried to pay|i was paying] at {merchant} but [it didn't work|it would not go through|the card did not work]",
        ),
        (
            "the shop sent the wrong code, please try once more",
            "your card was declined because the limit was reached",
        ),
    ),
    Topic(
        "banking",
        "a pending payment",
        (
            "[my|the|a] {payment} [of {money}|from {past}|] [is still pending|has been pending for {few} days|still shows as pending]",
            "[how long|until when] [will|does] a {payment} [stay|remain|show as] pending",
            "{why} is [my|this|the] {payment} [not completed|still waiting|being processed|not finished yet]",
        ),
        (
            "a pending payment is completed within {few} days",
            "the shop has not collected the money yet",
        ),
    ),
    Topic(
        "banking",
        "a payment charged twice",
        (
            "{merchant} [charged|billed|debited] me [twice|two times|double] [for one {thing}|for the same thing|{past}]",
            "[i see|there are|my statement shows] two [identical|equal|] {payment}s of {money}[| to {merchant}]",
            "i [paid|bought it] once [but|and] [the money left twice|it was taken out {few} times|it shows up again]",
        ),
        ("one of the two payments will be returned", "the second charge disappears {when}"),
    ),
    Topic(
        "banking",
        "an unknown payment",
        (
            "[there is|i see|i found|i noticed] a {payment} [i don't recognise|i know nothing about|i never made|that isn't mine] [in my {accountkind}|on my statement|of {money}]",
            "[what is|who made|where does] this {payment} of {money} [|from {past}|come from]",
            "i [didn't|did not|never] [make|approve|order] [a|this|that] {payment} [at|to|from] {merchant}",
        ),
        (
            "I have marked the payment as fraud and blocked your card",
            "we will look into that payment and write to you",
        ),
    ),
    Topic(
        "banking",
        "an extra fee",
        (
            "{why} [was i|am i|have i been] charged [a fee|an extra {money}|more than i expected|extra] [for|on] [a|my|the] {payment}",
            "[is there|do you take|do you have|what is] [a|the|any] [fee|charge|cost] for [a {payment}|using my card abroad|getting cash|sending money|exchanging {currency}]",
            "[a fee of {money}|an extra charge|a small charge|one {currency} extra] [appeared|showed up|was added|is on my statement] [when i paid|after a {payment}|{past}]",
        ),
        (
            "cash withdrawals abroad have a fee of two percent",
            "there is no fee for payments by card",
        ),
    ),
    Topic(
        "banking",
        "the exchange rate",
        (
            "[what is|tell me|how good is] [the|your|today's] exchange rate [for|from|between] {currency} [and|to|into] {currency}",
            "[the|your] [rate|exchange rate|conversion] [for|on] [my|the] {payment} in {currency} [is wrong|looks bad|was incorrect|is not what i saw]",
            "{want} [exchange|change|convert|swap|hold] {currency} [to|into|for|and] {currency}",
        ),
        (
            "we use the rate of the day for all currencies",
            "you can exchange money in the app at any hour",
        ),
    ),
    Topic(
        "banking",
        "cash from a machine",
        (
            "the [ATM|cash machine|machine] [kept|swallowed|ate|did not return] my {cardkind}",
            "[the machine|the ATM] [in {town}|at the {place}|] gave me [less cash than i asked for|only {money}|the wrong amount|no cash] [but|though] [it took|my balance lost|i was charged] {money}",
            "[can i|where can i|how can i] [get|withdraw|take out|draw] [cash|money|{money}] [in {country}|abroad|with my {cardkind}|from any ATM]",
        ),
        (
            "you can get cash at any machine with our sign",
            "the missing cash will be paid back {when}",
        ),
    ),
    Topic(
        "banking",
        "topping up",
        (
            "{how} [top up|add money to|put money on|load|fund] [my|the] {accountkind}[| with a {cardkind}| by {payment}| with cash| by cheque]",
            "[my|the] top-up [of {money}|] [failed|didn't work|was cancelled|is missing|isn't there|has not shown up|was reverted]",
            "[is there a limit|what is the limit|how much can i add|can it happen automatically] [when|if] [i top up|i add money|topping up][| with Apple Pay| by bank transfer]",
        ),
        (
            "choose add money in the app and pick a card",
            "your top-up failed because the bank refused it",
        ),
    ),
    Topic(
        "banking",
        "sending money",
        (
            "{want} [send|transfer|wire|move|pay] {money} to [my {relation}|{name}|a friend|an account in {country}|another bank]",
            "[the|my] transfer to [{name}|my {relation}|{country}|my landlord] [has not arrived|is late|failed|was declined|did not go through|was sent to the wrong person]",
            "[how long|how many days] [do|does] [a|an international|a European|a US|a local] transfer [take|need to arrive]",
            "{ask} [cancel|stop|reverse|undo] [a|my|the] transfer [of {money}|to {name}|i made {past}], [wrong account|it was a mistake|i typed the wrong number]",
        ),
        (
            "I have sent the money, it will arrive {when}",
            "a transfer to another country takes {few} days",
            "the transfer has been cancelled",
        ),
    ),
    Topic(
        "banking",
        "a new payee",
        (
            "{want} [add|save|remove|change] a [payee|beneficiary|recipient] [|in {country}|for my rent]",
            "[the|my] [new|] [beneficiary|payee|recipient] [is not allowed|was refused|does not show up|gets an error]",
        ),
        ("you can add a payee under transfers", "the name of the payee must match the account"),
    ),
    Topic(
        "banking",
        "the balance",
        (
            "[what is|tell me|show me|how much is|check] [my|the] [balance|account balance][| now| today| of my {accountkind}]",
            "how much [money|] [do i have|is left|is there] [in|on] my {accountkind}",
            "my balance [is wrong|did not change|was not updated|is still the same] after [a|my] {payment}",
        ),
        ("your balance is {money}", "there are {money} in your account"),
    ),
    Topic(
        "banking",
        "a refund",
        (
            "[where is|when do i get|i am waiting for|i didn't get] [my|the|a] refund [from {merchant}|for the {thing}|]",
            "{merchant} [promised|sent|owes|refunded] me {money} [but i can't see it|and it isn't in my account|{past}]",
            "{want} [get a refund|get my money back|be refunded|return something i bought] [for the {thing}|from {merchant}|]",
        ),
        ("the refund will be in your account {when}", "please ask the shop for a refund first"),
    ),
    Topic(
        "banking",
        "proving who you are",
        (
            "{why} [do you need|must i send|do you ask for] my {idpaper}",
            "[i can't|the app won't let me|how can i|where can i] [verify|prove|confirm] [my identity|who i am|my age|where my money comes from]",
            "[you|the app] [did not accept|rejected|can't read] my {idpaper}, [what else can i send|it keeps failing|why]",
        ),
        (
            "please send a clear photo of your passport",
            "the law says that we must check who you are",
        ),
    ),
    Topic(
        "banking",
        "personal details",
        (
            "{want} [change|update|correct|edit] my [address|name|phone number|e-mail|details|surname][| because i moved| after my wedding| in {appname}]",
            "i [have moved|got married|have a new phone|lost my phone|have a new number], [must i tell you|how do i tell you|what do i do about my account]",
        ),
        ("you can change your details under profile", "I have updated your details"),
    ),
    Topic(
        "banking",
        "opening an account",
        (
            "{want} [open|start|create|get] [an|a new|a second|a children's|] {accountkind}[| for my {relation}| in {country}]",
            "[how old must i be|who can|can my {relation}|can people in {country}] [open|have|get] an account",
            "[in which countries|where] [do you work|are you available|do you offer cards|can i use the card]",
        ),
        ("you can open an account in {few} minutes", "you must be eighteen to open an account"),
    ),
    Topic(
        "banking",
        "closing an account",
        (
            "{want} [close|delete|end|shut|leave] my {accountkind}[|, i am not happy| for good| and take my money]",
            "[i don't need|i no longer use|i'm done with] my {accountkind}, [remove it|please shut it down|goodbye]",
        ),
        (
            "I am sad to see you go, your account will close {when}",
            "you can close the account under settings",
        ),
    ),
    Topic(
        "banking",
        "ordering a card",
        (
            "{want} [order|get|have|buy|request] [a|another|a second|an extra] {cardkind}[| for my {relation}| for online shopping]",
            "[how much is|what does it cost to get|is there a fee for] [a|another] {cardkind}",
            "[my|the] {cardkind} [expires|runs out|is about to expire|is damaged|is broken|does not work] [{when}|], [do i get a new one|send me another]",
        ),
        ("I have ordered the card, it costs {money}", "your new card will come {when}"),
    ),
    Topic(
        "banking",
        "paying with a phone",
        (
            "{how} [connect|link|add|use] my {cardkind} [with|to|in] [Apple Pay|Google Pay|my phone|my watch]",
            "[contactless|Apple Pay|Google Pay|paying with my phone] [does not work|has stopped working|fails] [at {merchant}|]",
        ),
        (
            "open the wallet on your phone and add the card",
            "contactless works after the first payment with a PIN",
        ),
    ),
    Topic(
        "banking",
        "a loan",
        (
            "{want} [borrow|get a loan of|apply for a loan of] {money}[| for a {vehicle}| for a house]",
            "[what is|how high is] the [interest|interest rate|monthly payment] [on|for] [a loan|a mortgage|my savings]",
        ),
        ("the interest is {digit} percent a year", "you can borrow up to {money}"),
    ),
    Topic(
        "banking",
        "a card limit",
        (
            "{want} [raise|lower|change|see] [the|my] [limit|daily limit|spending limit] [on|of] my {cardkind}",
            "[how much can i spend|is there a maximum|what is the most i can pay] with [a|my] {cardkind}",
        ),
        ("your limit is {money} a day", "I have raised your limit"),
    ),
    # The road.
    Topic(
        "travel",
        "booking a flight",
        (
            "{want} [fly|take a plane|get on a plane] [from {town}|] to [{town}|{country}] {when}",
            "[find|look for|book|search for] [a flight|a plane|{number} seats|a cheap flight] to [{town}|{country}] [for me|] {when}",
        ),
        ("there is a flight at {hour} for {money}", "I have booked your flight to {town}"),
    ),
    Topic(
        "travel",
        "a late train",
        (
            "[is|why is] the {vehicle} to {town} [late|delayed|on time|cancelled][| again]",
            "my {vehicle} [was late|did not come|was cancelled|stopped for an hour] and i missed [my flight|the {event}|the next one]",
        ),
        ("the {vehicle} to {town} is {digit} minutes late", "the next {vehicle} leaves at {hour}"),
    ),
    Topic(
        "travel",
        "when it leaves",
        (
            "[when|what time|at what time] does the [next|first|last|] {vehicle} [leave|go|depart|arrive][| to {town}| from {town}]",
            "[is there|do you know] a {vehicle} [to|from] {town} {when}",
        ),
        ("the {vehicle} leaves at {hour}", "it goes at {hour} from the {place}"),
    ),
    Topic(
        "travel",
        "a hotel room",
        (
            "{want} [a room|a double room|a bed|a hotel room] [in|near] {town} for {few} nights",
            "{ask} [book|reserve|find] [a hotel|a room|a place to stay] [near the {place}|in {country}|in {town}] {when}",
        ),
        ("I have booked a room at the hotel in {town}", "the room costs {money} a night"),
    ),
    Topic(
        "travel",
        "lost luggage",
        (
            "[my|our] [suitcase|bag|luggage|backpack] [did not arrive|is missing|was left on the {vehicle}|was damaged] [at the airport|in {town}|]",
            "[how many bags|how much luggage|how heavy a bag] [can i take|may i bring] on the [plane|{vehicle}]",
        ),
        (
            "your bag will be brought to your hotel {when}",
            "please fill in the form for lost luggage",
        ),
    ),
    Topic(
        "travel",
        "the way",
        (
            "[how do i get|what is the way|show me the way|take me|how far is it] [from the {place}|] to the {place}",
            "[where is|how do i find] the [nearest|next|] {place}[| in {town}]",
        ),
        ("go straight on and turn left at the {place}", "the {place} is {few} minutes from here"),
    ),
    Topic(
        "travel",
        "changing a booking",
        (
            "{want} [change|move|cancel|swap] my [flight|seat|ticket|booking|reservation|trip] [to {day}|to {town}|{when}|]",
            "[is it free|what does it cost|how much is it] to [change|cancel] [a|my] [ticket|flight|booking]",
        ),
        ("I have changed your booking to {day}", "a change costs {money}"),
    ),
    Topic(
        "travel",
        "passports",
        (
            "[do i need|must i have] a [visa|passport|vaccination] for [{country}|a trip to {country}]",
            "my passport [runs out|is lost|is at home] and i [fly|travel] {when}",
        ),
        ("you need a passport for {country}", "you do not need a visa for {country}"),
    ),
    # The home.
    Topic(
        "home",
        "the lights",
        (
            "[turn|switch|put] [on|off|down|up] [the|all the] [lights|lamps|light] in the {room}",
            "[it is too dark|it's too bright|i can't see anything|make it brighter|make it darker] in [the|our] {room}",
        ),
        ("the light in the {room} is on", "I have switched off the light"),
    ),
    Topic(
        "home",
        "the heating",
        (
            "[set|turn|put] the [heating|thermostat|heater|temperature] [up|down|to {digit} degrees|in the {room} to {digit}]",
            "[i'm freezing|it's cold|it is too warm|it's boiling] in the {room}",
        ),
        ("the {room} is now {digit} degrees", "I have turned up the heating"),
    ),
    Topic(
        "home",
        "a broken device",
        (
            "[my|the|our] {device} [is broken|does not work|makes a strange noise|won't start|has stopped|leaks]",
            "{how} [repair|fix|clean|mend|reset] [a|my|the] {device}",
        ),
        ("try to switch the {device} off and on again", "a {job} can repair it {when}"),
    ),
    Topic(
        "home",
        "cleaning",
        (
            "[start|stop|send] the [vacuum cleaner|robot|cleaner] [in the {room}|now|{when}]",
            "the {room} is [dirty|dusty|a mess|full of dust], [clean it|do something]",
        ),
        ("I will clean the {room} {when}", "the vacuum cleaner has started"),
    ),
    Topic(
        "home",
        "the door",
        (
            "[lock|unlock|open|close|shut|check] the [front door|back door|garage|window|gate|blinds] [of the {room}|now|please|]",
            "[who is at|is somebody at|did i lock|is there anyone at] the door",
        ),
        ("the door is locked", "I have opened the door"),
    ),
    Topic(
        "home",
        "the internet",
        (
            "[the|my] [wifi|internet|connection|router] [is down|is slow|keeps dropping|does not work] [in the {room}|since {day}|]",
            "[what is|i forgot|tell me] the wifi password",
        ),
        ("please restart the router", "the internet will be back {when}"),
    ),
    # Music.
    Topic(
        "music",
        "playing a song",
        (
            "[play|put on|i want to hear|let me hear|start] [{song}|some {genre}|{song} by {band}|something by {band}|a song i like]",
            "[i feel like|i'm in the mood for|how about|give me] [some|a little|] {genre}",
        ),
        ("here is {song} by {band}", "now playing {genre}"),
    ),
    Topic(
        "music",
        "which song this is",
        (
            "[what is|what's|tell me|who sings|who wrote] [this song|the song|{song}|this tune]",
            "[what is the name of|i like|name] the [tune|track|song] [playing now|on the {device}|that is playing]",
        ),
        ("this is {song} by {band}", "it is a song by {band}"),
    ),
    Topic(
        "music",
        "the volume",
        (
            "[turn|make] [it|the music|the sound|the {device}] [up|down|louder|quieter|softer][| a bit| please]",
            "[i can't hear|it is too loud|my ears hurt|the music is too quiet|set the volume to {digit}]",
        ),
        ("the volume is now {digit}", "I have turned the music down"),
    ),
    Topic(
        "music",
        "the next song",
        (
            "[skip|next|stop|pause|repeat|go back to] [this|the] [song|track|one][| please]",
            "[i don't like this song|play that again|not this one|another one please]",
        ),
        ("here is the next song", "all right, I have stopped the music"),
    ),
    Topic(
        "music",
        "a playlist",
        (
            "[add|save|put] [this|{song}|this song] [to|in|on] my [list|playlist|favourites]",
            "[make|create|start] a [playlist|list] [for the {event}|of {genre}|with {band}]",
        ),
        ("I have added {song} to your list", "your new list is ready"),
    ),
    # The weather.
    Topic(
        "weather",
        "the weather",
        (
            "[what is|how is|tell me] the weather [like|] [in {town}|{when}|in {country} {when}]",
            "[will it|is it going to|does it] [rain|snow|freeze|be {weathery}] [in {town}|{when}|]",
            "[do i need|should i take|shall i bring] [an umbrella|a {clothing}|sunglasses] {when}",
        ),
        ("it will be {weathery} in {town}", "there will be {weather} {when}"),
    ),
    Topic(
        "weather",
        "the temperature",
        (
            "how [warm|cold|hot] [is it|will it be|does it get] [in {town}|outside|{when}]",
            "[what is|tell me] the temperature [in {town}|outside|now]",
        ),
        ("it is {digit} degrees in {town}", "about {digit} degrees"),
    ),
    # The calendar.
    Topic(
        "calendar",
        "setting an alarm",
        (
            "[wake me|get me up|set an alarm|ring] at {hour} [{when}|please|]",
            "[i have to|i must] get up [early|at {hour}] [{when}|], [wake me|don't let me sleep]",
        ),
        ("the alarm is set for {hour}", "I will wake you at {hour}"),
    ),
    Topic(
        "calendar",
        "a reminder",
        (
            "[remind me|don't let me forget|tell me] to [call my {relation}|buy {fruit}s|go to the {place}|take my {medicine}] {when}",
            "[i always forget|make a note|write down] [the {event}|to pay the rent|my {relation}'s birthday]",
        ),
        ("I will remind you {when}", "I have made a note"),
    ),
    Topic(
        "calendar",
        "a date in the calendar",
        (
            "[put|add|write] [the|a|my] {event} [with {name}|] [in|into] [my|the] [calendar|diary] [for {day}|{when}|at {hour}]",
            "[am i free|what am i doing|what do i have|do i have anything] {when}",
            "[move|cancel|delay|push] [the|my] {event} [with {name}|] [to {day}|to {hour}|]",
        ),
        ("the {event} is on {day} at {hour}", "you have a {event} with {name} at {hour}"),
    ),
    Topic(
        "calendar",
        "a timer",
        (
            "[set|start|stop|cancel] [a|the] timer [for {digit} minutes|for the {dish}|]",
            "[count down|tell me after|give me] {digit} minutes",
        ),
        ("the timer runs for {digit} minutes", "{digit} minutes from now"),
    ),
    Topic(
        "calendar",
        "the time",
        (
            "[what time is it|what's the time|what day is it|what is the date] [now|in {country}|today|]",
            "how [long|many days|many hours] until [the {event}|{month}|{hour}|{day}]",
        ),
        ("it is {hour}", "today is {day}"),
    ),
    # Shops.
    Topic(
        "shopping",
        "an order that is late",
        (
            "[where is|what about|when comes|i'm waiting for] [my|the] [order|parcel|package|{clothing}|{furniture}|{device}][| from {past}]",
            "i [ordered|bought] a {thing} {past} and it [has not come|never came|is not here|was not delivered]",
        ),
        ("your parcel will come {when}", "your order left our shop {past}"),
    ),
    Topic(
        "shopping",
        "sending something back",
        (
            "[the|this|my] [{clothing}|{thing}|{device}] is [too {size}|broken|the wrong size|not what i ordered|damaged|{colour} and i wanted {colour}]",
            "{want} [send back|return|exchange|bring back] [a|the] [{clothing}|{thing}|{furniture}]",
        ),
        ("you can send it back within {digit} days", "we will send you another one"),
    ),
    Topic(
        "shopping",
        "a price",
        (
            "[how much is|what does|what is the price of|how much does] [a|the|this] {thing}[| cost]",
            "do you have [a cheaper|a {colour}|a {size}|another] [{clothing}|{thing}|{furniture}]",
        ),
        ("it costs {money}", "the {thing} is {money}"),
    ),
    Topic(
        "shopping",
        "buying something",
        (
            "{want} [buy|order|get] [a|{number}|some] [{fruit}s|{thing}|{clothing}|{furniture}]",
            "[add|put] [a {thing}|{number} {fruit}s|some {drink}|{vegetable}s] [to|on|in] [my|the] [basket|shopping list|cart|order]",
        ),
        ("I have added it to your basket", "that makes {money}"),
    ),
    Topic(
        "shopping",
        "a discount code",
        (
            "[my|the|this] [voucher|coupon|discount code|gift card] [does not work|has expired|was refused|is wrong]",
            "[do you have|is there|can i get] [a discount|a sale|a voucher|something off] [on {clothing}s|for students|]",
        ),
        ("the code is good until {month}", "there is a sale {when}"),
    ),
    Topic(
        "shopping",
        "opening hours",
        (
            "[when|at what time|until when] [does|is] [the|your] [{shop}|{place}] [open|close|shut][| on {day}]",
            "[is|are] the [{shop}|{place}] [open|closed] {when}",
        ),
        ("we are open from eight to six", "the {shop} closes at {hour}"),
    ),
    # Food.
    Topic(
        "food",
        "a table",
        (
            "{want} [reserve|book|get] a table for {number} [people|] [at|in] [the restaurant|{name}'s|{town}] {when}",
            "[have you got|is there] [a table|room] for {number} {when}",
        ),
        ("your table is ready at {hour}", "I have booked a table for {number}"),
    ),
    Topic(
        "food",
        "ordering food",
        (
            "[i'll have|bring me|we'd like|i'd like|get me] [a|the|some] {dish} [and|with] [some|] [{drink}|{vegetable}s|{dish}]",
            "[send|deliver|order] [{number} {dish}|a pizza|some {dish}|dinner] [to the {place}|to my house|{when}]",
        ),
        ("your {dish} will be there at {hour}", "that will be {money}"),
    ),
    Topic(
        "food",
        "a recipe",
        (
            "{how} [cook|make|bake|prepare|boil] [a|some|] {dish} [with {vegetable}s|]",
            "[what goes into|what do i need for|how long do i cook|give me a recipe for] [a|the|] {dish}",
        ),
        (
            "take {number} {vegetable}s, some {drink} and {dish}, and cook it for {digit} minutes",
            "cook the {dish} for {digit} minutes",
        ),
    ),
    Topic(
        "food",
        "what is in the food",
        (
            "[is there|does it have|are there] [{fruit}|milk|nuts|sugar|meat|egg] in the {dish}",
            "[how many calories|how much sugar|how much salt] [are|is] in [a {fruit}|{dish}|a glass of {drink}]",
        ),
        ("there is no milk in the {dish}", "a {fruit} has {digit} calories"),
    ),
    # Health.
    Topic(
        "health",
        "feeling ill",
        (
            "[i have|i've got|my {relation} has|my child has] {ill} [since {day}|for {few} days|]",
            "my {body} [hurts|aches|is swollen|itches|feels strange|is sore] [when i {act}|since {day}|]",
        ),
        ("rest well and drink much water", "please see a doctor about your {body}"),
    ),
    Topic(
        "health",
        "seeing a doctor",
        (
            "{want} [see|visit|talk to] [a|the|my] [doctor|dentist|nurse|specialist|eye doctor] {when}",
            "[when is|is there|can you move|cancel] [my|an] appointment [with the doctor|at the hospital|at the dentist|]",
        ),
        ("the doctor can see you {when}", "your appointment is at {hour}"),
    ),
    Topic(
        "health",
        "medicine",
        (
            "[how many|how often|when] [should i take|do i take|must i use] [the|my|these] {medicine}",
            "[i have run out of|where can i get|i need more|refill my] {medicine}[| against {ill}]",
        ),
        ("take {medicine} {few} times a day", "the pharmacy has {medicine}"),
    ),
    Topic(
        "health",
        "keeping fit",
        (
            "{want} [lose weight|get fit|sleep better|eat better|run faster|quit smoking]",
            "[how many steps|how far|how much] did i [walk|run|sleep] {past}",
        ),
        ("walk for {digit} minutes every day", "you ran {digit} kilometres"),
    ),
    # Work, school, post, town.
    Topic(
        "work",
        "days off",
        (
            "{want} [take|have|request] [{few} days|a day|next week|{day}] off[| for {month}]",
            "[i am ill|i feel unwell|i have {ill}] and [can't come to work|stay at home] {when}",
        ),
        ("your days off have been approved", "get well soon"),
    ),
    Topic(
        "work",
        "pay",
        (
            "[when|on which day] do we get [paid|our salary|our wages]",
            "my [pay|salary|wage] [is late|is wrong|is too low|has not come] this month",
        ),
        ("salaries are paid at the end of the month", "your pay will come {when}"),
    ),
    Topic(
        "messages",
        "sending a message",
        (
            "[tell|write to|text|message|e-mail|ask] [{name}|my {relation}] that [i will be late|the {event} is {when}|i am at the {place}]",
            "[call|ring|phone] [{name}|my {relation}|the {shop}|the doctor] [back|now|{when}|]",
        ),
        ("your message to {name} has been sent", "I am calling {name}"),
    ),
    Topic(
        "messages",
        "reading messages",
        (
            "[read|show|open] [my|the|me the] [new|last|] [messages|e-mails|letters|mail] [from {name}|]",
            "[did {name}|has my {relation}] [write|answer|call|reply] [to me|] [{when}|]",
        ),
        ("you have {number} new messages", "{name} wrote to you {past}"),
    ),
    Topic(
        "news",
        "the news",
        (
            "[what's new|what is in the news|any news|tell me the news] [in {country}|about {sport}|today|]",
            "[who won|what was the score of] the {sport} match {past}",
        ),
        ("there was a {weather} in {town} {past}", "{town} won the match"),
    ),
    Topic(
        "housing",
        "the rent",
        (
            "[when|how] [must i|do i] pay [the|my] rent [for {month}|]",
            "my [landlord|landlady] wants [{money} more|to sell the house|to raise the rent]",
        ),
        ("the rent is {money} a month", "the rent is due in {month}"),
    ),
    Topic(
        "insurance",
        "an accident",
        (
            "[i had|my {relation} had|there was] [an accident|a crash|a fire|a leak] [with my {vehicle}|in the {room}|near {town}]",
            "[does my insurance|will you|do i have to] [pay|cover] [for|] [the {vehicle}|the damage|a stolen {vehicle}|a broken {device}]",
        ),
        ("please send us a photo of the damage", "the insurance will pay {money}"),
    ),
    Topic(
        "phone",
        "mobile data",
        (
            "[i have no|my phone has no|there is no] [signal|data|network|coverage] in [{town}|the {room}|{country}]",
            "[how much data|how many minutes] [do i have|are left|is left] [this month|]",
        ),
        ("you have {digit} gigabytes left", "please restart your phone"),
    ),
    Topic(
        "language",
        "a translation",
        (
            "[how do you say|what is the word for|translate|how do they say] [{animal}|{fruit}|hello|thank you|good night] in [French|Spanish|German|Italian|Polish]",
            "what does [this word|this letter|the sign] mean",
        ),
        ("I only speak English", "I do not know that language"),
    ),
)
